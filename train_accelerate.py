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
from pathlib import Path

# Threads that wait for each other on a CPU must sleep, not spin: beside decoding processes, spinning made steps ten
# times slower. The OpenMP runtime reads this when torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
# Who has started this process, looked up before the seconds that imports take.
PARENT = os.getppid()

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import parse_flag_from_env, set_seed
from transformers.utils.logging import disable_progress_bar

from everest_hf.data import class_names_of
from everest_hf.data.workers import naming_lost_workers
from everest_hf.distributed import let_main_process_speak, main_first, tell_launcher
from everest_hf.evaluation.evaluate import evaluate_model
from everest_hf.evaluation.few_shot import evaluate_few_shot
from everest_hf.evaluation.neighbours import evaluate_neighbours
from everest_hf.evaluation.report import with_spread
from everest_hf.evaluation.threshold import set_threshold
from everest_hf.files import printable
from everest_hf.hub import Uploads
from everest_hf.hub.card import write_card
from everest_hf.training import build, loaders, quickstart
from everest_hf.training.accelerator import build_accelerator
from everest_hf.training.batch_size import with_batch_size
from everest_hf.training.checkpoints import Checkpoints, save_final_model
from everest_hf.training.dry_run import dry_run
from everest_hf.training.folder import hold
from everest_hf.training.guard import INTERRUPTED, end_with_launcher
from everest_hf.training.inputs import model_inputs
from everest_hf.training.optim import MovingAverage, averaged
from everest_hf.training.options import parse_command_line
from everest_hf.training.progress import Progress
from everest_hf.training.recipe import Recipe, load_recipe
from everest_hf.training.run import Run, set_up, set_up_evaluation
from everest_hf.training.summary import draw_pictures, summarise


def train(recipe: Recipe) -> dict[str, float]:
    """Run a recipe from its data to a saved model and return the last figures on its validation set."""
    accelerator = build_accelerator(recipe)
    with hold(Path(recipe.output_dir), accelerator):
        recipe = with_batch_size(recipe, accelerator)
        run, model = main_first(accelerator, set_up, recipe, accelerator)
        uploads = main_first(accelerator, Uploads, recipe.push_to_hub, run.folder, accelerator)
        loader, sampler = loaders.build_train_loader(recipe, run.config, run.train, run.total_batch)
        optimizer, schedule = build.build_optimizer(recipe, model, run.total_batch, run.steps_per_epoch)
        model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
        average = build.finish_model(recipe, accelerator, model)
        set_seed(recipe.seed, device_specific=True)  # each process draws for dropout and erasing on its own
        progress = Progress(run, accelerator)
        parts = {"schedule": schedule, **progress.parts}
        checkpoints = Checkpoints(run.folder, accelerator, parts=parts, average=average, **run.checkpointing)
        step = checkpoints.resume()
        if recipe.task == "probe":
            calibrate(run, accelerator, model)  # a frozen encoder keeps in training what it keeps in evaluation

        with progress.started(step, checkpoints.standing):
            for epoch in progress.epochs(step):
                model.train()
                loader.set_epoch(epoch)
                sampler.set_epoch(epoch, start=step % run.steps_per_epoch * run.total_batch)
                for batch in progress.batches(loader):
                    with accelerator.accumulate(model):
                        loss = model(**model_inputs(batch, recipe, run.config)).loss
                        accelerator.backward(loss)
                        if accelerator.sync_gradients:
                            grad_norm = accelerator.clip_grad_norm_(model.parameters(), recipe.clip_grad or math.inf)
                        optimizer.step()
                        optimizer.zero_grad()
                    progress.end_batch(loss, batch)
                    if not accelerator.sync_gradients:
                        continue

                    step += 1
                    lr, figures = schedule.get_last_lr()[-1], {}
                    schedule.step()
                    if average:
                        average.update()
                    progress.end_step(step, lr, grad_norm)
                    with progress.paused():
                        ends = progress.is_over(step) or progress.stopping
                        if ends or run.is_judged_after(step) or checkpoints.are_due(step, {}):
                            calibrate(run, accelerator, model, average)
                        if run.is_evaluated_after(step):
                            figures = judge(run, accelerator, model, average)
                            progress.end_evaluation(step, figures)
                        if run.is_monitored_after(step):
                            progress.write(step, monitor(run, accelerator, model, average))
                        if progress.is_over(step) or progress.stopping or checkpoints.are_due(step, figures):
                            progress.settle()
                            checkpoints.save(step, figures, model, run.processor)
                            if uploads.repo and not progress.is_over(step):
                                uploads.start(checkpoints.all()[-1], run, step)
                    if progress.stopping:
                        progress.stop(step)

        figures, result = {}, step if recipe.keep == "last" else checkpoints.restore_best(step)
        if recipe.keep == "best" or run.config.keep_threshold is None:  # or the last step has found it
            calibrate(run, accelerator, model, average)
        if run.val is not None:
            figures = judge(run, accelerator, model, average, loaders.final_views(recipe), run.folder)
            if recipe.evaluation == "few_shot":
                figures |= measure_features(run, accelerator, model, average, figures)
            progress.write(step, figures)
        saved = save_final_model(accelerator, model, run.processor, run.folder, average)
        if accelerator.is_main_process:
            write_card(saved, run, steps=result, figures=figures)
            draw_pictures(run, saved, progress.log.read())
            print(summarise(run, step, figures, progress.log.read(), saved, checkpoints.best(), progress.bad))
        progress.log.close()
        accelerator.free_memory()
        if uploads.repo:  # last of all, so that nothing is lost where it fails
            print(f"pushed to {uploads.finish(saved)}")
        return figures


def judge(
    run: Run,
    accelerator: Accelerator,
    model: torch.nn.Module,
    average: MovingAverage | None = None,
    views: tuple[int, int] = (1, 1),
    folder: Path | None = None,
) -> dict[str, float]:
    """Return the figures of a prepared model, with the average of its weights if there is one, on the videos of val.

    views: segments and crops of a video. folder: for the files of an evaluation.
    """
    recipe = run.recipe
    loader = loaders.build_val_loader(recipe, run.config, run.val, *views)
    source, count_bad = str(recipe.val), recipe.count_bad_as_wrong
    with averaged(average):
        return evaluate_model(accelerator, model, loader, source=source, count_bad=count_bad, folder=folder)


def calibrate(
    run: Run, accelerator: Accelerator, model: torch.nn.Module, average: MovingAverage | None = None
) -> None:
    """In training with token_budget "batch", find what evaluation keeps by, with the average of the weights if any."""
    found = run.config.keep_threshold is not None
    if run.config.token_budget == "clip" or (run.recipe.task == "probe" and found):
        return  # a probe's encoder stays as it is
    loader = loaders.build_calibration_loader(run.recipe, run.config, run.train)
    with averaged(average):
        set_threshold(accelerator, model, loader)


def monitor(
    run: Run, accelerator: Accelerator, model: torch.nn.Module, average: MovingAverage | None
) -> dict[str, float]:
    """Return the figure of the recipe's monitor of a pre-training, with the average of the weights if there is one."""
    loader = loaders.build_val_loader(run.recipe, run.config, run.val, 1, 1)
    with averaged(average):
        return evaluate_neighbours(accelerator, model, loader, source=str(run.recipe.val))


def measure_features(
    run: Run,
    accelerator: Accelerator,
    model: torch.nn.Module,
    average: MovingAverage | None = None,
    others: dict[str, float] | None = None,
) -> dict[str, float]:
    """Return what few labels of train make of a prepared model's features, on the videos of val.

    others: figures that stand before these in figures.json.
    """
    recipe = run.recipe
    rows = (run.train, run.val)
    train, val = (loaders.build_val_loader(recipe, run.config, videos, 1, 1) for videos in rows)
    with averaged(average):
        return evaluate_few_shot(
            accelerator,
            model,
            train,
            val,
            names=class_names_of(run.train),
            seed=recipe.seed,
            count_bad=recipe.count_bad_as_wrong,
            folder=run.folder,
            others=others,
        )


def evaluate(recipe: Recipe) -> dict[str, float]:
    """Evaluate a trained model, or its features; the files go into a folder of their own."""
    accelerator = build_accelerator(recipe)
    run, model = main_first(accelerator, set_up_evaluation, recipe)
    model = accelerator.prepare_model(model, evaluation_mode=True)
    with hold(run.folder, accelerator):
        if recipe.evaluation == "few_shot":
            figures = measure_features(run, accelerator, model)
        else:
            figures = judge(run, accelerator, model, None, loaders.final_views(recipe), run.folder)
    shown = ", ".join(f"{name} {value}" for name, value in with_spread(figures, 5).items())
    accelerator.print(f"{run.num_val} videos of {recipe.val}: {shown}\nfiles in {run.folder}")
    return figures


def run_quickstart(options: dict, state: PartialState) -> None:
    """Write a small set of videos, pre-train on them, fine-tune from that checkpoint, evaluate on held-out videos."""
    with hold(quickstart.folder_of(options), state):
        stages = main_first(state, quickstart.load_stages, options)
        for recipe in stages.values():
            train(recipe)
        if state.is_main_process:
            print(quickstart.summarise(stages))


def start(path: str | None, options: dict, state: PartialState) -> None:
    """Do what the command line asks for: the quickstart, a dry run, an evaluation or a training."""
    if path is None and not {"train", "eval_only", "dry_run"} & options.keys():
        run_quickstart(options, state)
        return
    recipe = main_first(state, load_recipe, path, options)
    for warning in recipe.warnings():
        state.print(f"warning: {warning}", file=sys.stderr)
    (dry_run if recipe.dry_run else evaluate if recipe.eval_only else train)(recipe)


def main(arguments: list[str] | None = None, *, launcher: int | None = None) -> None:
    """Run a command line, by default the process's, and exit.

    launcher: the parent process, whose end is to end this run where it is a launcher.
    """
    disable_progress_bar()  # the bars of loading and saving would cut through the run's own
    if launcher is not None:
        end_with_launcher(launcher)
    state = PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"))
    try:
        path, options = main_first(state, parse_command_line, arguments)
        with naming_lost_workers():
            start(path, options, state)
        state.destroy_process_group()  # whose threads must not outlive the interpreter
    except (ValueError, OSError) as error:
        message = f"error: {printable(str(error))}"
        tell_launcher(message)
        sys.exit(message)
    except SystemExit as end:
        if end.code == 1:
            let_main_process_speak(state)
        raise
    except KeyboardInterrupt:
        if state.is_main_process:
            print("interrupted; the same command goes on from the last checkpoint, if there is one", file=sys.stderr)
        sys.exit(INTERRUPTED)


if __name__ == "__main__":
    main(launcher=PARENT)
