"""Resources of a machine for a run: disk, shared memory, open files, memory."""

import resource
import shutil
from pathlib import Path

from detection.config.run_config import RunConfig
from detection.config.settings import RankInfo
from detection.data import worker_shm
from detection.data.host_cache import GIB, available_host_memory
from detection.preflight.check_result import CheckResult

MIB = 2**20
NUM_KEPT_CHECKPOINTS = 4  # the last two, the best, and the one being written
LOGS_BYTES = 64 * MIB
FILES_PER_RANK = 256  # upper bound of a rank's open libraries, sockets and logs
# Each tensor of a batch is a file in shared memory. Device preprocessing uses more tensors.
FILES_PER_BATCH = {"host": 8, "device": 20}


def check_machine(config: RunConfig, rank_info: RankInfo, batch_bytes: int, parameter_bytes: int) -> list[CheckResult]:
    """Check disk, shared memory, open files and memory of this machine."""
    num_workers = config.num_workers * rank_info.local_world_size
    batches = worker_shm.needed_bytes(num_workers, batch_bytes)
    files_per_batch = FILES_PER_BATCH["device" if config.device_preprocessing else "host"]
    folder = Path(config.run_dir) if config.run_dir else config.log_dir
    # A checkpoint contains the weights and one momentum value per weight.
    return [
        check_disk(folder, free_disk_bytes(folder), NUM_KEPT_CHECKPOINTS * 2 * parameter_bytes + LOGS_BYTES),
        check_shared_memory(worker_shm.free_bytes(), batches, num_workers),
        check_open_files(resource.getrlimit(resource.RLIMIT_NOFILE)[0], config.num_workers, files_per_batch),
        check_memory(available_host_memory(), batches + host_cache_bytes(config)),
    ]


def free_disk_bytes(folder: Path) -> int:
    """Return the free bytes on the disk of a folder that may not exist yet."""
    existing = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    return shutil.disk_usage(existing).free


def host_cache_bytes(config: RunConfig) -> int:
    """Return the requested size of the host image cache. Without one, the cache uses the free memory."""
    return int(config.image_cache_gib * GIB) if config.image_cache == "host" else 0


def check_disk(folder: Path, free: int, needed: int) -> CheckResult:
    """Check the disk space for checkpoints and logs."""
    message = f"{folder}: {format_bytes(free)} free, checkpoints and logs take up to {format_bytes(needed)}"
    return check_headroom("disk", free, needed, message, "Free some space, or set LOGDIR to another disk.")


def check_shared_memory(free: int | None, needed: int, num_workers: int) -> CheckResult:
    """Check the shared memory for the batches of all data workers."""
    if free is None:
        return CheckResult("shared memory", "pass", f"{worker_shm.SHM_DIR} does not exist: no limit")
    message = f"{format_bytes(free)} free, {num_workers} data workers take up to {format_bytes(needed)}"
    hint = "Give the container more (docker run --shm-size or --ipc=host), or pass a smaller --num-workers."
    return check_headroom("shared memory", free, needed, message, hint)


def check_open_files(limit: int, num_workers: int, files_per_batch: int) -> CheckResult:
    """Check the limit of open files for the batches of a rank's workers."""
    needed = FILES_PER_RANK + num_workers * (worker_shm.PREFETCH_FACTOR + 1) * files_per_batch
    if limit == resource.RLIM_INFINITY:
        return CheckResult("open files", "pass", f"no limit, a rank opens up to {needed}")
    message = f"ulimit -n is {limit}, a rank with {num_workers} data workers opens up to {needed}"
    return check_headroom("open files", limit, needed, message, f"Run `ulimit -n {max(4096, 4 * needed)}` first.")


def check_memory(free: int, needed: int) -> CheckResult:
    """Check the memory for prefetched batches and the image cache, in addition to what the ranks already use."""
    message = f"{format_bytes(free)} free next to the ranks, batches and image cache take {format_bytes(needed)}"
    hint = "Pass a smaller --num-workers or --image-cache-gib."
    return check_headroom("memory", free, needed, message, hint)


def check_headroom(name: str, available: int, needed: int, message: str, hint: str) -> CheckResult:
    """Fail if less than the needed amount is available, warn if less than twice that amount."""
    if available >= 2 * needed:
        return CheckResult(name, "pass", message)
    return CheckResult(name, "fail" if available < needed else "warn", message, hint)


def format_bytes(num_bytes: int) -> str:
    """Format a number of bytes."""
    return f"{num_bytes / GIB:.1f} GiB" if num_bytes >= GIB else f"{num_bytes / MIB:.0f} MiB"
