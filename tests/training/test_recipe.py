"""Recipes: where values come from, what is refused, and what is written down."""

import dataclasses
from pathlib import Path

import pytest

from everest_hf.configuration_everest import TASKS
from everest_hf.training.names import NAMES_ELSEWHERE
from everest_hf.training.options import parse_command_line
from everest_hf.training.recipe import CONFIG_FIELDS, TASK_DEFAULTS, Recipe, load_recipe

RECIPES = Path(__file__).parents[2] / "recipes"


def write_recipe(folder, text: str) -> Path:
    path = Path(folder) / "recipe.yaml"
    path.write_text(text)
    return path


# ------------------------------------------------------------------------------------------- where values come from


def test_command_line_over_yaml_over_defaults(tmp_path):
    path = write_recipe(tmp_path, "train: videos\nepochs: 70\nbatch_size: 7\nconfig: {patch_size: 8, num_frames: 4}\n")
    recipe = load_recipe(path, {"epochs": 60, "config": {"num_frames": 6}})
    assert recipe.epochs == 60  # command line
    assert recipe.batch_size == 7  # file
    assert recipe.weight_decay == Recipe(train="videos").weight_decay  # default
    assert recipe.config == {"patch_size": 8, "num_frames": 6}  # field by field


def test_fine_tuning_has_defaults_of_its_own_below_the_file(tmp_path):
    path = write_recipe(tmp_path, "train: videos\ntask: finetune\nlayer_decay: 0.9\n")
    recipe = load_recipe(path, {})
    assert recipe.layer_decay == 0.9
    assert (recipe.epochs, recipe.label_smoothing, recipe.betas) == (100, 0.1, [0.9, 0.999])
    assert recipe.config == {"drop_path_rate": 0.1}
    assert load_recipe(path, {"config": {"drop_path_rate": 0.2}}).config == {"drop_path_rate": 0.2}


def test_the_task_of_the_command_line_chooses_the_defaults(tmp_path):
    path = write_recipe(tmp_path, "train: videos\n")
    assert load_recipe(path, {"task": "finetune"}).epochs == 100
    assert load_recipe(path, {}).epochs == 800


def test_without_a_file_the_options_are_enough():
    assert load_recipe(None, {"train": "videos", "epochs": 50}).epochs == 50


def test_a_run_is_its_model(tmp_path):
    saved = tmp_path / "run" / "model"
    saved.mkdir(parents=True)
    for place in (tmp_path / "run", "owner/name"):
        assert load_recipe(None, {"train": "videos", "model": str(place)}).model == str(place)
    (saved / "config.json").write_text("{}")
    for place in (tmp_path / "run", saved):
        assert load_recipe(None, {"train": "videos", "model": str(place)}).model == str(saved)


def test_what_a_run_does_without_is_said_where_it_learns_labels():
    def warnings(**options) -> list[str]:
        return load_recipe(None, {"train": "videos", **options}).warnings()

    assert [line.split(":")[0] for line in warnings(task="finetune")] == ["no --model", "no --val"]
    assert [line.split(":")[0] for line in warnings(task="finetune", val="videos")] == ["no --model"]
    assert [line.split(":")[0] for line in warnings(task="probe", model="owner/name")] == ["no --val"]
    assert warnings(task="finetune", model="owner/name", val="videos") == []
    assert warnings(task="finetune", eval_only=True, val="videos") == []
    assert warnings() == []


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("problem_type", [None, "regression"])
def test_a_recipe_made_in_python_has_the_defaults_of_its_task(task, problem_type):
    config = {"keep_ratio": 0.5, "problem_type": problem_type}
    made = Recipe(task=task, train="videos", epochs=60, config=config)
    assert made == load_recipe(None, {"task": task, "train": "videos", "epochs": 60, "config": config})
    assert made.layer_decay == (0.75 if task == "finetune" else 1.0)
    assert made.label_smoothing == (0.1 if task == "finetune" and problem_type is None else 0.0)
    assert made.config.get("drop_path_rate") == (0.1 if task == "finetune" else None)


def test_a_task_that_is_none_is_refused_in_python_too():
    with pytest.raises(ValueError, match="task is 'sing'; it must be one of pretrain, finetune, probe"):
        Recipe(task="sing", train="videos")


def test_recipes_share_no_lists():
    first, second = Recipe(train="videos"), Recipe(train="videos")
    first.betas.append(0.5)
    first.config["patch_size"] = 8
    assert second.betas == [0.9, 0.95]
    assert second.config == {}
    load_recipe(None, {"train": "videos", "task": "finetune"}).betas.append(0.5)
    assert load_recipe(None, {"train": "videos", "task": "finetune"}).betas == [0.9, 0.999]


@pytest.mark.parametrize("text", ["1e-3", "1.0e-3", "0.001", "1E-3", "+1e-3"])
def test_numbers_as_people_write_them(tmp_path, text):
    path = write_recipe(tmp_path, f"train: videos\nbase_lr: {text}\nconfig: {{layer_norm_eps: {text}}}\n")
    recipe = load_recipe(path)
    assert recipe.base_lr == 0.001
    assert recipe.config["layer_norm_eps"] == 0.001


def test_whole_numbers_pass_as_floats_but_not_the_reverse(tmp_path):
    assert load_recipe(write_recipe(tmp_path, "train: videos\nwarmup_epochs: 3\n")).warmup_epochs == 3
    with pytest.raises(ValueError, match=r"epochs is 2\.5"):
        load_recipe(write_recipe(tmp_path, "train: videos\nepochs: 2.5\n"))


# ------------------------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("epohcs: 3", "unknown key 'epohcs'; did you mean 'epochs'?"),
        ("config: {patch_sise: 8}", "unknown key 'patch_sise'; did you mean 'patch_size'?"),
        ("qqqq: 3", "unknown key 'qqqq'; known are task, output_dir"),
        ("3: 3", "unknown key 3"),
        ("epochs: many", "epochs is 'many'; it must be of the type int"),
        ("epochs: true", "epochs is True; it must be of the type int"),
        ("base_lr: fast", "base_lr is 'fast'; it must be of the type float"),
        ("flip: 1", "flip is 1; it must be of the type bool"),
        ("betas: 0.9", "betas is 0.9; it must be"),
        ("betas: [0.9]", "betas is [0.9]; it must be"),
        ("betas: [0.9, x]", "betas is [0.9, 'x']; it must be"),
        ("crop_scale: [a, b]", "crop_scale is ['a', 'b']; it must be"),
        ("crop_scale: []", "crop_scale is []; it must be"),
        ("{task: finetune, crop_scale: [1.0, 0.5]}", "crop_scale is [1.0, 0.5]; it must be a range"),
        ("crop_ratio: [0.5]", "crop_ratio is [0.5]; it must be"),
        ("config: 3", "config is 3; it must be"),
        ("config: [patch_size]", "config is ['patch_size']; it must be"),
        ("val: 3", "val is 3; it must be of the type str"),
        ("task: sing", "task is 'sing'; it must be one of pretrain, finetune"),
        ("frame_sampling: dense", "frame_sampling is 'dense'; it must be one of"),
        ("epochs: 0", "epochs is 0; it must be at least 1"),
        ("batch_size: -1", "batch_size is -1; it must be at least 1"),
        ("erasing: 1.5", "erasing is 1.5; it must be at least 0 and below 1"),
        ("rand_augment: 11", "rand_augment is 11; it must be at most 10"),
        ("augmentation: slow", "augmentation is 'slow'; it must be one of"),
        ("mixup: -0.5", "mixup is -0.5; it must be 0 or more"),
        ("base_lr: 0", "base_lr is 0; it must be above 0"),
        ("base_lr: .nan", "base_lr is nan; it must be"),
        ("ema: 1", "ema is 1; it must be at least 0 and below 1"),
        ("save_every: 0", "save_every is 0; it must be above 0"),
        ("report_to: tensorbord", "report_to is 'tensorbord'; it must be one of ('none', 'tensorboard'"),
        ("weight_decay: .inf", "weight_decay is inf; it must be"),
        ("layer_decay: 1.5", "layer_decay is 1.5; it must be above 0 and at most 1"),
        ("warmup_epochs: 900", "warmup_epochs is 900; it must be at most 800 epochs"),
        ("class_weights: equal", "class_weights is 'equal'; it must be one of ('none', 'balanced')"),
        ("class_weights: balanced", "class_weights is 'balanced'; it must be none in pre-training"),
        ("balanced_sampling: true", "balanced_sampling is True; it must be False in pre-training"),
        (
            "{task: finetune, class_weights: balanced, config: {problem_type: regression}}",
            "class_weights is 'balanced'; it must be none with problem_type=regression",
        ),
        (
            "{task: probe, balanced_sampling: true, streaming: true, steps_per_epoch: 2}",
            "balanced_sampling is True; it must be False with streaming",
        ),
        (
            "{task: finetune, class_weights: balanced, config: {class_weights: [1, 2]}}",
            "class_weights is 'balanced'; it must be none where config has class_weights",
        ),
        ("patience: 3", "patience is 3; it must be 0 without val"),
        ("keep: best", "keep is 'best'; it must be last without val"),
        ("monitor: knn", "monitor is 'knn'; it must be none without val"),
        ("{task: probe, monitor: knn, val: videos}", "monitor is 'knn'; it must be none with task=probe"),
        ("monitor_every: 0", "monitor_every is 0; it must be at least 1"),
        ("- train", "a recipe is a list of 'name: value' lines"),
        ("train: [videos", "not a readable YAML recipe"),
        ("", "a recipe is a list of 'name: value' lines"),
    ],
)
def test_what_a_file_says_wrong_is_named_with_the_file(tmp_path, text, message):
    path = write_recipe(tmp_path, text + "\n")
    options = {} if "train" in text else {"train": "videos"}
    with pytest.raises(ValueError) as raised:
        load_recipe(path, options)
    assert str(raised.value).startswith(f"{path}: ")
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


def test_the_recipes_of_the_project_are_found_without_a_checkout(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    packaged = load_recipe("recipes/quickstart/pretrain.yaml", {"train": "videos"})
    assert packaged == load_recipe(RECIPES / "quickstart" / "pretrain.yaml", {"train": "videos"})
    own = tmp_path / "recipes" / "quickstart" / "pretrain.yaml"
    own.parent.mkdir(parents=True)
    own.write_text("epochs: 40\n")
    assert load_recipe("recipes/quickstart/pretrain.yaml", {"train": "videos"}).epochs == 40


def test_missing_values_and_files_are_named(tmp_path):
    with pytest.raises(ValueError, match="train is None; it must be a list file or a folder of class folders"):
        load_recipe(None, {})
    with pytest.raises(ValueError, match=r"nowhere.yaml: no such recipe"):
        load_recipe(tmp_path / "nowhere.yaml", {})
    with pytest.raises(ValueError, match=f"{tmp_path}: not a readable YAML recipe: .*directory"):
        load_recipe(tmp_path, {})


# ------------------------------------------------------------------------------------------------- the command line


def test_options_have_the_types_of_the_fields():
    arguments = "mine.yaml --epochs 3 --base_lr 1e-3 --betas 0.8 0.9 --flip --no-overwrite --val held --task finetune"
    path, options = parse_command_line(arguments.split())
    assert path == "mine.yaml"
    assert options == {
        "epochs": 3,
        "base_lr": 0.001,
        "betas": [0.8, 0.9],
        "flip": True,
        "overwrite": False,
        "val": "held",
        "task": "finetune",
    }


def test_config_of_the_command_line_is_read_as_yaml():
    arguments = ["--train", "videos", "--config", "image_size=[64, 112]", "keep_ratio=6e-1", "token_selection=tube"]
    _, options = parse_command_line([*arguments, "norm_pix_loss=false"])
    wanted = {"image_size": [64, 112], "keep_ratio": 0.6, "token_selection": "tube", "norm_pix_loss": False}
    assert options["config"] == wanted
    assert load_recipe(None, options).config == wanted


def test_without_arguments_nothing_is_set():
    assert parse_command_line([]) == (None, {})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--epohcs", "3"], "--epohcs"),
        (["--epochs", "many"], "many"),
        (["--task", "sing"], "sing"),
        (["--config", "patch_size"], "--config takes KEY=VALUE, not 'patch_size'"),
        (["--config", "patch_size=[8"], "patch_size=[8"),
        (["a.yaml", "b.yaml"], "b.yaml"),
    ],
)
def test_a_wrong_command_line_is_one_line(arguments, message):
    with pytest.raises(ValueError) as raised:
        parse_command_line(arguments)
    assert str(raised.value).startswith("command line: ")
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_misspelt_option_is_told_the_nearest():
    with pytest.raises(ValueError, match="did you mean '--epochs'"):
        parse_command_line(["--epohcs", "3"])


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("lr", "did you mean '--base_lr', peak learning rate for a total batch of 256"),
        ("learning_rate", "did you mean '--base_lr', peak learning rate for a total batch of 256"),
        ("num_train_epochs", "did you mean '--epochs', passes over the training videos"),
        ("per_device_train_batch_size", "did you mean '--batch_size', videos a process and step"),
        ("model_name_or_path", "did you mean '--model', checkpoint"),
        ("save_steps", "did you mean '--save_every', epochs between checkpoints"),
        ("keep_ratio", "it is a field of the model: --config keep_ratio=VALUE"),
    ],
)
def test_names_of_other_programs_get_the_right_hint(tmp_path, name, hint):
    for spelling in ([f"--{name}", "3"], [f"--{name}=3"], [f"--{name.replace('_', '-')}", "3"]):
        with pytest.raises(ValueError) as raised:
            parse_command_line(spelling)
        assert hint in str(raised.value)
    path = write_recipe(tmp_path, f"train: videos\n{name}: 3\n")
    with pytest.raises(ValueError) as raised:
        load_recipe(path)
    wanted = "it is a field of config" if "--config" in hint else hint.replace("--", "")
    assert f"{path}: unknown key '{name}'; {wanted}" in str(raised.value)


def test_every_name_of_other_programs_leads_to_a_field():
    names = {option.name for option in dataclasses.fields(Recipe)}
    assert set(NAMES_ELSEWHERE.values()) <= names
    assert not set(NAMES_ELSEWHERE) & (names | set(CONFIG_FIELDS))


def test_hyphen_and_underscore_are_the_same_in_options():
    arguments = "--base-lr 1e-3 --batch-size=4 --no-eval-only --no_dry_run --output-dir a-b_c"
    wanted = {"base_lr": 0.001, "batch_size": 4, "eval_only": False, "dry_run": False, "output_dir": "a-b_c"}
    assert parse_command_line(arguments.split())[1] == wanted


def test_abbreviations_are_refused():
    with pytest.raises(ValueError, match="--epoch"):
        parse_command_line(["--epoch", "3"])


def test_help_names_every_option_with_its_default(capsys):
    with pytest.raises(SystemExit) as raised:
        parse_command_line(["--help"])
    assert raised.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    for option in dataclasses.fields(Recipe):
        assert f"--{option.name}" in text
        assert option.metadata["help"] in text
    assert "peak learning rate for a total batch of 256, scaled linearly [0.001]" in text
    assert "betas of AdamW [0.9 0.95; finetune: 0.9 0.999; probe: 0.9 0.999]" in text


def test_help_has_the_defaults_of_each_task(capsys):
    with pytest.raises(SystemExit):
        parse_command_line(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "passes over the training videos [800; finetune: 100; probe: 50]" in text
    assert "weight decay, none on biases and norms [0.05; probe: 0.0]" in text
    assert "wrong where left and right differ in class [False; finetune: True; probe: True]" in text
    assert "as KEY=VALUE ... [finetune: drop_path_rate=0.1]" in text
    assert text.count("finetune: ") == len(TASK_DEFAULTS["finetune"])
    assert text.count("probe: ") == len(TASK_DEFAULTS["probe"])


def test_help_fits_on_two_screens(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    with pytest.raises(SystemExit):
        parse_command_line(["--help"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) <= 120
    assert max(map(len, lines)) <= 100


# ------------------------------------------------------------------------------------------------- the saved recipe


def test_a_saved_recipe_repeats_the_run(tmp_path):
    recipe = load_recipe(
        None, {"train": "videos", "task": "finetune", "base_lr": 1e-7, "config": {"image_size": [64, 112]}}
    )
    recipe.save(tmp_path / "recipe.yaml")
    again = load_recipe(tmp_path / "recipe.yaml")
    assert again == recipe
    assert again.differences(recipe) == []


def test_a_saved_recipe_does_not_overwrite_the_run_that_it_repeats(tmp_path):
    load_recipe(None, {"train": "videos", "overwrite": True}).save(tmp_path / "recipe.yaml")
    assert load_recipe(tmp_path / "recipe.yaml").overwrite is False


def test_differences_are_those_that_change_a_run():
    recipe = load_recipe(None, {"train": "videos"})
    other = load_recipe(
        None, {"train": "videos", "epochs": 50, "config": {"patch_size": 8}, "num_workers": 7, "overwrite": True}
    )
    assert recipe.differences(other) == ["config", "epochs"]


def test_paths_at_home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", "/home/somebody")
    (tmp_path / "recipe.yaml").write_text("train: videos\noutput_dir: ~/runs/one\nmodel: ~/encoder\n")
    recipe = load_recipe(tmp_path / "recipe.yaml")
    assert (recipe.output_dir, recipe.model) == ("/home/somebody/runs/one", "/home/somebody/encoder")
