"""Initialization of a run, before its timer starts: model on the device, optimizer, warm-up."""

import time
from collections.abc import Callable
from pathlib import Path

import torch

from detection.checkpoint.weights import Weights
from detection.config.run_config import RunConfig
from detection.config.settings import InputError
from detection.data.batch import Batch, RankBatch
from detection.data.prefetch import to_device
from detection.engine import optim
from detection.engine.model_mode import eval_mode, set_train_mode
from detection.engine.state import RunContext, TrainState
from detection.engine.workload import Workload
from detection.nn.placement import place_model
from detection.runtime import device
from detection.runtime.distributed import DistContext


def load_weights(
    run: RunContext, load_network: Callable[[Path], Weights], load_backbone: Callable[[Path], None]
) -> None:
    """Load the initial weights that the settings name, if any: the whole network or its backbone. Raise InputError."""
    config = run.config
    if config.weights:
        taken = load_network(Path(config.weights))
        run.log.event("checkpoint", Path(config.weights).name)
        run.logger.print(f"{config.weights}: weights of a checkpoint of {taken.origin}; {taken.report}")
    elif config.backbone_weights:
        load_backbone(Path(config.backbone_weights))


def build_state(workload: Workload[Batch], config: RunConfig, ranks: DistContext) -> TrainState:
    """Move the model to the device, and build its optimizer and gradient scaler."""
    device.set_kernel_autotune(ranks.device, fixed_input_size=workload.fixed_input_size)
    precision = device.select_precision(config.precision, ranks.device)
    model = ranks.convert_sync_batchnorm(workload.model, config.bn_group_size(ranks.world_size))
    compiled = device.should_compile(config.compile, ranks.device)
    model = place_model(
        model,
        ranks.device,
        precision,
        config.channels_last,
        trains_batch_norm=not config.freeze_batch_norm,
        compiled=compiled,
    )
    set_train_mode(model, config)
    if compiled:
        model.compile()
    return TrainState(
        model=ranks.wrap_ddp(model, config.gradient_dtype),
        optimizer=optim.build_optimizer(
            model,
            name=config.optimizer,
            backend=config.optimizer_backend,
            momentum=config.momentum,
            weight_decay=config.weight_decay,
            weight_decay_on_bias_and_norm=config.weight_decay_on_bias_and_norm,
            bias_lr_factor=config.bias_lr_factor,
        ),
        scaler=torch.amp.GradScaler(ranks.device.type, enabled=precision.scale_gradients),
        precision=precision,
        skipped_steps=torch.zeros((), dtype=torch.int64, device=ranks.device),
    )


def warm_up(state: TrainState, workload: Workload[Batch], run: RunContext, train_step: Callable[..., object]) -> None:
    """Train and predict on one dummy batch to compile code and allocate memory, then restore the initial state.

    train_step: `train_loop.train_step`. Raise InputError if --compile on cannot be met. `--compile auto` falls back to
    eager mode.
    """
    config, ranks = run.config, run.ranks
    start_s = time.monotonic()
    initial_weights = {name: tensor.clone() for name, tensor in state.model.state_dict().items()}
    compile_status = "compiled" if device.should_compile(config.compile, ranks.device) else "not compiled"

    def step() -> None:
        rank_batch = to_device(RankBatch(workload.dummy_batch(), 1, 1.0), ranks.device)
        train_step(state, rank_batch, workload, config, ranks)

    try:
        step()
    except torch._dynamo.exc.TorchDynamoException as error:
        reason = " ".join(str(error).split("\n\n")[0].split())
        if config.compile == "on":
            raise InputError(f"--compile on: not possible on this machine ({reason}). Pass --compile off.") from error
        compile_status = f"not compiled: not possible on this machine ({reason})"
        device.force_eager()
        step()
    if ranks.device.type != "cpu":  # the CPU selects no kernels
        with eval_mode(state, run) as model:
            workload.predict(model, to_device(workload.dummy_eval_batch(), ranks.device))
        set_train_mode(state.model, config)
    run.logger.print(f"warmed up in {time.monotonic() - start_s:.1f} s, {compile_status}")
    state.model.load_state_dict(initial_weights)
    optim.reset_optimizer_state(state.optimizer)
    state.scaler = torch.amp.GradScaler(ranks.device.type, enabled=state.scaler.is_enabled())
    state.skipped_steps.zero_()
    state.step = 0
