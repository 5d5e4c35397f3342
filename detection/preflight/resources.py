"""Whether a machine has room for a run: disk, shared memory, open files, memory."""

import resource
import shutil
from pathlib import Path

from detection.config.run_config import RunConfig
from detection.config.settings import Topology
from detection.data import worker_shm
from detection.data.host_cache import GIB, free_memory_bytes
from detection.preflight.check_result import Finding

MIB = 2**20
KEPT = 4  # checkpoints at once: the last two, the best, and the one that is being written
LOGS_BYTES = 64 * MIB
FILES_OF_A_RANK = 256  # libraries, sockets and logs that a rank holds open, with room
# A tensor of a batch is a file while it waits in shared memory; there are more where the device makes the images.
FILES_OF_A_BATCH = {"host": 8, "device": 20}


def check_machine(config: RunConfig, topology: Topology, batch_bytes: int, parameter_bytes: int) -> list[Finding]:
    """Disk, shared memory, open files and memory of this machine."""
    num_workers = config.num_workers * topology.local_world_size
    batches = worker_shm.needed_bytes(num_workers, batch_bytes)
    files = FILES_OF_A_BATCH["device" if config.images_on_device else "host"]
    folder = Path(config.run_dir) if config.run_dir else config.log_dir
    # A checkpoint holds the weights and a momentum for each of them.
    return [
        check_disk(folder, free_disk_bytes(folder), KEPT * 2 * parameter_bytes + LOGS_BYTES),
        check_shared_memory(worker_shm.free_bytes(), batches, num_workers),
        check_open_files(resource.getrlimit(resource.RLIMIT_NOFILE)[0], config.num_workers, files),
        check_memory(free_memory_bytes(), batches + cache_bytes(config)),
    ]


def free_disk_bytes(folder: Path) -> int:
    """What is free where a folder is, or would be made."""
    there = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    return shutil.disk_usage(there).free


def cache_bytes(config: RunConfig) -> int:
    """What decoded images are asked to take, where the settings say how much; else they take what is free."""
    return int(config.image_cache_gib * GIB) if config.image_cache == "host" else 0


def check_disk(folder: Path, free: int, needed: int) -> Finding:
    """Whether checkpoints and logs find room."""
    what = f"{folder}: {size(free)} free, a run's checkpoints and logs take up to {size(needed)}"
    return compare("disk", free, needed, what, "Make room, or name another folder by LOGDIR.")


def check_shared_memory(free: int | None, needed: int, num_workers: int) -> Finding:
    """Whether the batches of all data workers find room."""
    if free is None:
        return Finding("shared memory", "pass", f"{worker_shm.FOLDER} is not there: nothing limits it")
    what = f"{size(free)} free, {num_workers} data workers take up to {size(needed)}"
    todo = "Give the container more (docker run --shm-size or --ipc=host), or pass fewer --num-workers."
    return compare("shared memory", free, needed, what, todo)


def check_open_files(limit: int, num_workers: int, files_of_a_batch: int) -> Finding:
    """Whether a rank may open as many files as its workers' batches are."""
    needed = FILES_OF_A_RANK + num_workers * (worker_shm.BATCHES_AHEAD + 1) * files_of_a_batch
    if limit == resource.RLIM_INFINITY:
        return Finding("open files", "pass", f"no limit, a rank holds up to {needed}")
    what = f"ulimit -n is {limit}, a rank with {num_workers} data workers holds up to {needed}"
    return compare("open files", limit, needed, what, f"Say `ulimit -n {max(4096, 4 * needed)}` before the run.")


def check_memory(free: int, needed: int) -> Finding:
    """Whether the batches ahead and the decoded images fit beside what the ranks hold already."""
    what = f"{size(free)} free beside the ranks, batches ahead and decoded images take {size(needed)}"
    todo = "Pass fewer --num-workers, or a smaller --image-cache-gib."
    return compare("memory", free, needed, what, todo)


def compare(name: str, there: int, needed: int, what: str, what_to_do: str) -> Finding:
    """Fail where there is less than is needed, warn where there is less than twice that."""
    if there >= 2 * needed:
        return Finding(name, "pass", what)
    return Finding(name, "fail" if there < needed else "warn", what, what_to_do)


def size(num_bytes: int) -> str:
    """Bytes for people."""
    return f"{num_bytes / GIB:.1f} GiB" if num_bytes >= GIB else f"{num_bytes / MIB:.0f} MiB"
