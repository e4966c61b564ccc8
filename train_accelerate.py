"""Pre-train or fine-tune EVEREST on video files, on one process or many.

accelerate launch train_accelerate.py                                the quickstart, on videos that it makes
accelerate launch train_accelerate.py RECIPE.yaml [--option value]   a run of your own; see recipes/
"""

import os
import sys
from pathlib import Path

# Threads that wait for each other on a CPU must sleep, not spin: beside decoding processes, spinning made steps ten
# times slower. The OpenMP runtime reads this when torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

from accelerate import Accelerator, PartialState
from accelerate.utils import set_seed
from tqdm.auto import tqdm
from transformers.utils.logging import disable_progress_bar

from everest_hf import quickstart, training
from everest_hf.checkpoints import Checkpoints, save_final_model
from everest_hf.data import BadVideos
from everest_hf.evaluation import evaluate_model
from everest_hf.recipe import Recipe, load_recipe, parse_command_line

RECIPES = Path(__file__).parent / "recipes"


def train(recipe: Recipe) -> dict[str, float]:
    """Run a recipe from its data to a saved model and return the last figures on its validation set."""
    accelerator = Accelerator(gradient_accumulation_steps=recipe.gradient_accumulation_steps)
    training.use_all_cores(accelerator)
    folder = training.main_first(accelerator, training.prepare_output, recipe, accelerator)
    log = training.RunLog(folder / training.LOG, accelerator)

    train_rows, val_rows = training.main_first(accelerator, training.load_rows, recipe)
    set_seed(recipe.seed)
    model = training.main_first(accelerator, training.build_model, recipe, train_rows)
    config, processor = model.config, training.build_processor(recipe, model.config)
    training.main_first(accelerator, training.check_videos, recipe, config, train_rows, val_rows, accelerator)
    train_loader, val_loader = training.build_loaders(recipe, config, train_rows, val_rows)

    model, train_loader = accelerator.prepare(model, train_loader)
    steps_per_epoch = -(-len(train_loader) // recipe.gradient_accumulation_steps)
    total_batch = recipe.batch_size * accelerator.num_processes * recipe.gradient_accumulation_steps
    optimizer, schedule = training.build_optimizer(
        recipe, accelerator.unwrap_model(model), total_batch, steps_per_epoch
    )
    optimizer = accelerator.prepare(optimizer)
    accelerator.register_for_checkpointing(schedule)
    set_seed(recipe.seed, device_specific=True)  # each process draws tokens of its own

    checkpoints = Checkpoints(folder, recipe.keep_checkpoints, accelerator)
    first_epoch, step = checkpoints.resume()
    total_steps = recipe.epochs * steps_per_epoch
    log.cut_after(step, finished=step == total_steps)
    accelerator.print(training.describe(recipe, config, train_rows, val_rows, total_batch, total_steps))
    bar = tqdm(total=total_steps, initial=step, desc=recipe.task, unit="step", disable=not accelerator.is_main_process)
    meter, bad = training.Meter(), BadVideos()

    for epoch in range(first_epoch, recipe.epochs):
        model.train()
        train_loader.set_epoch(epoch)
        for batch in training.watched(train_loader, bad, recipe, len(train_rows)):
            with accelerator.accumulate(model):
                loss = model(**training.model_inputs(batch, recipe, config)).loss
                accelerator.backward(loss)
                if accelerator.sync_gradients and recipe.clip_grad:
                    accelerator.clip_grad_norm_(model.parameters(), recipe.clip_grad)
                optimizer.step()
                optimizer.zero_grad()
            meter.add(loss, len(batch["pixel_values"]))
            if not accelerator.sync_gradients:
                continue
            step += 1
            bar.update()
            if step % recipe.log_every == 0 or step == total_steps:
                line = {**meter.read(accelerator), "lr": schedule.get_last_lr()[-1]}
                log.write(step=step, epoch=epoch, **line)
                bar.set_postfix_str(f"loss {line['loss']:.3f}, {line['clips_per_second']:.0f} clips/s")
            schedule.step()

        last = epoch + 1 == recipe.epochs
        if val_rows is not None and not last and (epoch + 1) % recipe.eval_every == 0:
            figures = evaluate_model(accelerator, model, val_loader(1, 1), recipe)
            log.write(step=step, epoch=epoch, **figures)
        if (epoch + 1) % recipe.save_every == 0 or last:
            checkpoints.save(epoch + 1, step, model, processor)
    bar.close()

    figures = {}
    if val_rows is not None:
        views = (recipe.segments, recipe.crops) if recipe.task == "finetune" else (1, 1)
        figures = evaluate_model(accelerator, model, val_loader(*views), recipe)
        log.write(step=step, epoch=recipe.epochs - 1, **figures)
    saved = save_final_model(accelerator, model, processor, folder)
    if accelerator.is_main_process:
        training.draw_pictures(recipe, accelerator.unwrap_model(model), val_rows or train_rows, log.read(), folder)
    accelerator.print(training.summarise(recipe, figures, saved, bad))
    accelerator.free_memory()
    return figures


def run_quickstart(options: dict) -> None:
    """Write a small set of videos, pre-train on them, fine-tune from that checkpoint, evaluate on held-out videos."""
    state = PartialState()
    videos = training.main_first(state, quickstart.write_videos)
    stages = quickstart.load_stages(RECIPES / "quickstart", videos, options)
    for recipe in stages.values():
        train(recipe)
    if state.is_main_process:
        print(quickstart.summarise(stages))


def main() -> None:
    disable_progress_bar()  # those of loading and saving would cut through the run's own
    try:
        path, options = parse_command_line()
        if path is None and "train" not in options:
            run_quickstart(options)
        else:
            train(load_recipe(path, options))
    except (ValueError, FileNotFoundError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
