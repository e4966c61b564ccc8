"""Pre-train or fine-tune EVEREST on video files, on one process or many.

accelerate launch train_accelerate.py                                the quickstart, on videos that it makes
accelerate launch train_accelerate.py RECIPE.yaml [--option value]   a run of your own; see recipes/
accelerate launch train_accelerate.py RECIPE.yaml --dry_run          what it would do, checked; nothing is trained
accelerate launch train_accelerate.py RECIPE.yaml --eval_only        its model, or another --model, on its videos of val

For one process `python train_accelerate.py` does the same, without the launcher's traceback after an error.
"""

import math
import os
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

# Threads that wait for each other on a CPU must sleep, not spin: beside decoding processes, spinning made steps ten
# times slower. The OpenMP runtime reads this when torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
# Who has started this process, looked up before the seconds that imports take.
PARENT = os.getppid()

from accelerate import Accelerator, PartialState
from accelerate.utils import parse_flag_from_env, set_seed
from transformers.utils.logging import disable_progress_bar

from everest_hf.data import BadVideos
from everest_hf.data.workers import naming_lost_workers
from everest_hf.distributed import main_first, tell_launcher
from everest_hf.evaluation.evaluate import evaluate_model
from everest_hf.files import printable
from everest_hf.hub import Uploads
from everest_hf.hub.card import RunFacts, hardware_of, write_card
from everest_hf.training import build, loaders, logging, quickstart
from everest_hf.training import run as runs
from everest_hf.training.accelerator import build_accelerator
from everest_hf.training.checkpoints import Checkpoints, save_final_model
from everest_hf.training.dry_run import dry_run
from everest_hf.training.guard import INTERRUPTED, STOPPED, Watch, end_with_launcher
from everest_hf.training.inputs import model_inputs
from everest_hf.training.optim import averaged
from everest_hf.training.recipe import Recipe, load_recipe, parse_command_line


def train(recipe: Recipe) -> dict[str, float]:
    """Run a recipe from its data to a saved model and return the last figures on its validation set."""
    accelerator = build_accelerator(recipe)
    with runs.hold(Path(recipe.output_dir), accelerator):
        return train_alone(recipe, accelerator)


def train_alone(recipe: Recipe, accelerator: Accelerator) -> dict[str, float]:
    """Do what `train` does, with the run's folder held."""
    folder = main_first(accelerator, runs.prepare_output, recipe, accelerator)
    log = logging.RunLog(folder / logging.LOG, accelerator)

    train_rows, val_rows = main_first(accelerator, loaders.load_rows, recipe)
    set_seed(recipe.seed)
    model = main_first(accelerator, build.build_model, recipe, train_rows)
    config, processor = model.config, build.build_processor(recipe, model.config)
    main_first(accelerator, loaders.check_videos, recipe, config, train_rows, val_rows, accelerator, folder)
    num_videos, total_batch, steps_per_epoch = main_first(
        accelerator, loaders.count_steps, recipe, train_rows, accelerator.num_processes
    )
    uploads = main_first(accelerator, Uploads, recipe.push_to_hub, folder, accelerator)
    train_loader, sampler, val_loader = loaders.build_loaders(recipe, config, train_rows, val_rows, total_batch)

    optimizer, schedule = build.build_optimizer(recipe, model, total_batch, steps_per_epoch)
    model, optimizer, train_loader = accelerator.prepare(model, optimizer, train_loader)
    average = build.finish_model(recipe, accelerator, model)
    set_seed(recipe.seed, device_specific=True)  # each process draws for dropout and erasing on its own

    judge = partial(evaluate_model, accelerator, model, source=str(recipe.val), count_bad=recipe.count_bad_as_wrong)
    meter, bad = logging.Meter(accelerator.device), BadVideos(folder / runs.BAD_VIDEOS)
    facts = RunFacts(recipe, num_videos, len(val_rows or ()), total_batch, hardware_of(accelerator))
    checkpoints = Checkpoints(
        folder,
        accelerator,
        keep=recipe.keep_checkpoints,
        every=max(1, round(recipe.save_every * steps_per_epoch)),
        total_batch=total_batch,
        steps_per_epoch=steps_per_epoch,
        data=main_first(accelerator, loaders.identities_of, train_rows, val_rows),
        parts={"schedule": schedule, "meter": meter},
        average=average,
    )
    step, total_steps = checkpoints.resume(), recipe.epochs * steps_per_epoch
    log.cut_after(step, finished=step == total_steps)
    log.start_trackers(vars(recipe), step)
    accelerator.print(runs.describe(recipe, config, num_videos, val_rows, total_batch, total_steps))
    bar = logging.Bar(recipe.task, step, total_steps, hidden=not accelerator.is_main_process)
    watch = Watch(accelerator, lambda indices: loaders.names_of(train_rows, indices), checkpoints.standing)

    with bar, watch:
        for epoch in range(step // steps_per_epoch, recipe.epochs):
            model.train()
            train_loader.set_epoch(epoch)
            sampler.set_epoch(epoch, start=step % steps_per_epoch * total_batch)
            for batch in meter.timed(train_loader):
                bad.take(batch)
                with accelerator.accumulate(model):
                    loss = model(**model_inputs(batch, recipe, config)).loss
                    accelerator.backward(loss)
                    if accelerator.sync_gradients:
                        grad_norm = accelerator.clip_grad_norm_(model.parameters(), recipe.clip_grad or math.inf)
                    optimizer.step()
                    optimizer.zero_grad()
                watch.add_batch(loss, batch["index"])
                if not accelerator.sync_gradients:
                    continue

                step += 1
                lr = schedule.get_last_lr()[-1]
                meter.add(watch.end_step(step, lr, grad_norm), total_batch)
                schedule.step()
                if average:
                    average.update()
                bar.advance()
                last, ends_epoch, figures = step == total_steps, step % steps_per_epoch == 0, {}
                if step % recipe.log_every == 0 or ends_epoch:
                    loaders.share_bad(accelerator, bad, recipe, num_videos)
                if ends_epoch and bad.count:
                    log.write(step=step, epoch=epoch, bad_videos=len(bad.reasons), replaced=bad.count)
                if step % recipe.log_every == 0 or last:
                    watch.settle()
                    line = {**meter.read(total_steps - step), "lr": lr, "grad_norm": watch.grad_norm}
                    bar.show(line)
                    log.write(step=step, epoch=epoch, **line)
                with meter.paused():
                    if val_rows is not None and not last and step % (recipe.eval_every * steps_per_epoch) == 0:
                        with averaged(average):
                            figures = judge(val_loader(1, 1))
                        log.write(step=step, epoch=epoch, **figures)
                    if last or watch.stopping or checkpoints.are_due(step, figures):
                        watch.settle()
                        checkpoints.save(step, figures, model, processor)
                        if uploads.repo and not last:
                            uploads.start(checkpoints.all()[-1], replace(facts, steps=step))
                if watch.stopping:
                    accelerator.print(f"stopped by SIGTERM after step {step}; the same command goes on from there")
                    log.close()
                    sys.exit(STOPPED)

    figures = {}
    if val_rows is not None:
        views = loaders.final_views(recipe)
        with averaged(average):
            figures = judge(val_loader(*views), folder=folder)
        log.write(step=step, epoch=recipe.epochs - 1, **figures)
    saved = save_final_model(accelerator, model, processor, folder, average)
    if accelerator.is_main_process:
        write_card(saved, replace(facts, steps=step, figures=figures))
        runs.draw_pictures(recipe, saved, val_rows or train_rows, log.read(), folder)
        print(runs.summarise(recipe, figures, log.read(), saved, checkpoints.best(), bad))
    log.close()
    accelerator.free_memory()
    if uploads.repo:  # last of all, so that nothing is lost where it fails
        print(f"pushed to {uploads.finish(saved)}")
    return figures


def evaluate(recipe: Recipe) -> dict[str, float]:
    """Evaluate a trained model as at the end of its training; the files go into a folder of their own."""
    accelerator = build_accelerator(recipe)
    folder = Path(recipe.output_dir) / "evaluation"
    model = main_first(accelerator, build.load_trained, recipe)
    rows = main_first(accelerator, loaders.load_held_out, recipe, model.config)
    loader = loaders.build_val_loader(recipe, model.config, rows, *loaders.final_views(recipe))
    model = accelerator.prepare_model(model, evaluation_mode=True)
    with runs.hold(folder, accelerator):
        figures = evaluate_model(
            accelerator, model, loader, source=str(recipe.val), count_bad=recipe.count_bad_as_wrong, folder=folder
        )
    shown = ", ".join(f"{name} {value:.5g}" for name, value in figures.items())
    accelerator.print(f"{len(rows)} videos of {recipe.val}: {shown}\nfiles in {folder}")
    return figures


def run_quickstart(options: dict, state: PartialState) -> None:
    """Write a small set of videos, pre-train on them, fine-tune from that checkpoint, evaluate on held-out videos."""
    with runs.hold(quickstart.folder_of(options), state):
        videos = main_first(state, quickstart.write_videos)
        stages = main_first(state, quickstart.load_stages, videos, options)
        for recipe in stages.values():
            train(recipe)
        if state.is_main_process:
            print(quickstart.summarise(stages))


def start(path: Path | None, options: dict, state: PartialState) -> None:
    """Do what the command line asks for: the quickstart, a dry run, an evaluation or a training."""
    if path is None and not {"train", "eval_only", "dry_run"} & options.keys():
        run_quickstart(options, state)
        return
    recipe = main_first(state, load_recipe, path, options)
    for warning in recipe.warnings():
        state.print(f"warning: {warning}", file=sys.stderr)
    (dry_run if recipe.dry_run else evaluate if recipe.eval_only else train)(recipe)


def main() -> None:
    disable_progress_bar()  # those of loading and saving would cut through the run's own
    end_with_launcher(PARENT)
    state = PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"))
    try:
        path, options = main_first(state, parse_command_line)
        with naming_lost_workers():
            start(path, options, state)
        state.destroy_process_group()  # whose threads must not outlive the interpreter
    except (ValueError, OSError) as error:
        message = f"error: {printable(str(error))}"
        tell_launcher(message)
        sys.exit(message)
    except KeyboardInterrupt:
        if state.is_main_process:
            print("interrupted; the same command goes on from the last checkpoint, if there is one", file=sys.stderr)
        sys.exit(INTERRUPTED)


if __name__ == "__main__":
    main()
