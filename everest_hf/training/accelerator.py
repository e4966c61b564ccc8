"""The Accelerator of a run: its processes and devices, shards by FSDP2 or DeepSpeed, precision and threads."""

import os
import platform
from pathlib import Path

import torch
from accelerate import Accelerator, DeepSpeedPlugin, FullyShardedDataParallelPlugin, PartialState
from accelerate.utils import DistributedType, parse_flag_from_env
from transformers.integrations import unset_hf_deepspeed_config

from ..data.workers import num_cores
from ..distributed import end_together, main_first
from ..modeling_everest import EverestLayer
from ..video import decoders_of
from .logging import check_tracker
from .recipe import Recipe


def build_accelerator(recipe: Recipe) -> Accelerator:
    """Return the Accelerator of a run, which writes to the recipe's tracker.

    Raises:
        ValueError: tracker or decoder are not installed, the processes have no devices, or the recipe asks for what
            CPUs or DeepSpeed do not offer.
    """
    state = PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"))
    _check_processes(state)
    main_first(state, _check_installed, recipe)
    accelerator = Accelerator(
        gradient_accumulation_steps=recipe.gradient_accumulation_steps,
        log_with=None if recipe.report_to == "none" else recipe.report_to,
        project_dir=recipe.output_dir,
    )
    if accelerator.mixed_precision == "fp16" and accelerator.device.type == "cpu":
        end_together(ValueError("mixed_precision is fp16, which CPUs do not have; it must be bf16 or no"))
    is_sharded = parse_flag_from_env("ACCELERATE_USE_FSDP") or parse_flag_from_env("ACCELERATE_USE_DEEPSPEED")
    for name, value, off in (("monitor", recipe.monitor, "none"), ("evaluation", recipe.evaluation, "views")):
        if value != off and is_sharded:
            what = f"{name} is {value!r}, which is not offered with FSDP or DeepSpeed; leave it out"
            end_together(ValueError(what))
    if parse_flag_from_env("ACCELERATE_USE_FSDP"):
        _prepare_sharding(accelerator)
    if parse_flag_from_env("ACCELERATE_USE_DEEPSPEED"):
        _prepare_deepspeed(recipe, accelerator)
    _use_all_cores(accelerator)
    return accelerator


def _check_processes(state: PartialState) -> None:
    """Raise a ValueError where Accelerate found nothing to run the launcher's processes on: each would run alone."""
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if launched > state.num_processes:
        raise ValueError(
            f"{launched} processes were launched, and there is no GPU for them; on CPUs set ACCELERATE_USE_CPU=true"
        )


def _check_installed(recipe: Recipe) -> None:
    check_tracker(recipe.report_to)
    decoders_of(recipe.video_backend)


def _prepare_sharding(accelerator: Accelerator) -> None:
    """Shard layer by layer where the configuration names no classes, on CPUs too, and let all processes load."""
    if accelerator.distributed_type == DistributedType.MULTI_CPU:
        # Accelerate's FSDP2 works on CPUs, but it starts it on accelerators alone.
        accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin()
        _set_distributed_type(accelerator, DistributedType.FSDP)
    plugin = accelerator.state.fsdp_plugin
    # All processes load the model: left to the first alone, a head that is new would stay without values on the others.
    plugin.cpu_ram_efficient_loading = False
    os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"  # where Transformers looks it up
    if plugin.transformer_cls_names_to_wrap is None:
        # Not the embeddings, the model's other unit: Accelerate shards their projection on its own, and twice fails.
        plugin.transformer_cls_names_to_wrap = [EverestLayer.__name__]


def hardware_of(accelerator: Accelerator) -> str:
    """Say in words what a run works on, and in which precision."""
    count = accelerator.num_processes
    if accelerator.device.type == "cuda":
        what = f"{count} × {torch.cuda.get_device_name()}"
    else:
        what = f"{count} process{'es' if count > 1 else ''} on {os.cpu_count()} CPU cores ({platform.machine()})"
    return f"{what}, {'fp32' if accelerator.mixed_precision == 'no' else accelerator.mixed_precision}"


def _set_distributed_type(accelerator: Accelerator, distributed_type: DistributedType) -> None:
    for state in (PartialState(), accelerator.state):
        state.distributed_type = distributed_type


def _prepare_deepspeed(recipe: Recipe, accelerator: Accelerator) -> None:
    """Let DeepSpeed train by the recipe, on CPUs too, in the precision of other runs, and give the whole model back."""
    if accelerator.distributed_type == DistributedType.MULTI_CPU:  # as with FSDP2
        accelerator.state.deepspeed_plugins = DeepSpeedPlugin()
        accelerator.state.deepspeed_plugins.set_mixed_precision(accelerator.mixed_precision)
        accelerator.state.deepspeed_plugins.select(_from_accelerator_state=True)
        _set_distributed_type(accelerator, DistributedType.DEEPSPEED)
    # Transformers would now make and load models in shards: `parameter_groups` could not read them, and the main
    # process could load none alone.
    unset_hf_deepspeed_config()
    if accelerator.mixed_precision == "fp16":
        end_together(ValueError("mixed_precision is fp16, which is not offered with DeepSpeed; it must be bf16 or no"))
    if recipe.ema:
        end_together(ValueError("ema is not offered with DeepSpeed, which keeps the weights to itself; FSDP2 has it"))
    plugin = accelerator.deepspeed_plugin
    plugin.zero3_init_flag = plugin.zero_stage == 3  # else Accelerate would gather no shards
    config = plugin.deepspeed_config
    config["zero_optimization"]["stage3_gather_16bit_weights_on_model_save"] = True
    _take_over(config, "gradient_accumulation_steps", recipe, "gradient_accumulation_steps")
    _take_over(config, "gradient_clipping", recipe, "clip_grad")
    if accelerator.mixed_precision == "bf16":
        # The model of eval_only has no engine of DeepSpeed; Accelerate casts it to PyTorch's default dtype.
        accelerator.native_amp = True
        torch.set_autocast_dtype(accelerator.device.type, torch.bfloat16)
        if not (recipe.eval_only or recipe.dry_run):
            # Its own bf16 would round weights and position tables, and with them the result.
            config["bf16"]["enabled"] = False
            config["torch_autocast"] = {"enabled": True, "dtype": "bfloat16"}


def _take_over(config: dict, name: str, recipe: Recipe, option: str) -> None:
    """Put a value of the recipe into the configuration of DeepSpeed, which must not name another."""
    value = getattr(recipe, option)
    if config.get(name, "auto") not in ("auto", value):
        end_together(
            ValueError(
                f"{option} of the recipe is {value}, {name} in the configuration of DeepSpeed {config[name]}; leave it "
                'out there, or in a file of DeepSpeed\'s own make it "auto"'
            )
        )
    config[name] = value


def _use_all_cores(accelerator: Accelerator) -> None:
    """Give the processes of a CPU run all cores where `accelerate launch` left each one thread, unasked."""
    if accelerator.device.type == "cpu" and os.environ.get("OMP_NUM_THREADS") == "1" and not _threads_were_chosen():
        torch.set_num_threads(max(1, num_cores() // accelerator.num_processes))


def _threads_were_chosen() -> bool:
    """Say whether OMP_NUM_THREADS is the user's: the launcher has it, or there is no launcher."""
    if "ACCELERATE_DYNAMO_MODE" not in os.environ:  # which the launcher always sets
        return True
    try:
        environment = Path(f"/proc/{os.getppid()}/environ").read_bytes()  # the launcher's, as it was started
    except OSError:  # not Linux
        return False
    return any(variable.startswith(b"OMP_NUM_THREADS=") for variable in environment.split(b"\0"))
