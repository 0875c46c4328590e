"""Loading: every recipe loads, paths are relative to the file that says them, and every kind of wrong
configuration is one line with key, value and the way out."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from pns.config import Config, DataSource, Dtype, stages, to_dict
from pns.data.benchmarks import TRAINING_SETS
from pns.errors import UserError
from pns.preference_losses import PREFERENCE_LOSSES
from pns.preflight import check_models
from pns.recipe import load, merge_layers, override_layer, resolve_path
from pns.tiny.settings import Architecture, WarmStart, check_settings

ROOT = Path(__file__).parents[1]
RECIPES = sorted(ROOT.glob("recipes/*.yaml"))


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_loads_from_any_directory(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = load(os.path.relpath(recipe))
    monkeypatch.chdir(tmp_path)
    config = load(recipe)
    assert config.name == recipe.stem
    assert to_dict(config)["models"]["backbone"] == config.models.backbone
    check_models(config, stages(config))
    judge = config.reward.terms["coherence"].model
    for model in (config.models.backbone, config.models.reward_model, judge):
        assert Path(model).is_absolute() is ("tiny" in recipe.stem) or not model
    assert config.runs == str(tmp_path / "runs")
    here.runs = config.runs
    assert here == config


def test_there_are_recipes() -> None:
    tiny = {"tiny-qwen2", "tiny-llama", "tiny-qwen3"}
    real = {"qwen2.5-7b", "llama-3.1-8b", "qwen3-8b", "qwen2.5-0.5b", "qwen2.5-1.5b", "qwen3-4b"}
    assert tiny | real <= {path.stem for path in RECIPES}


def test_real_recipes_ask_the_seven_benchmarks() -> None:
    seven = {"gsm8k", "math500", "amc23", "minerva_math", "olympiadbench", "aime24", "aime25"}
    for path in RECIPES:
        config = load(path)
        if config.data.source is DataSource.jsonl:
            assert set(config.data.benchmarks) == seven
            assert config.data.jsonl.train in TRAINING_SETS
            longest = config.data.max_prompt_tokens + config.rollout.max_new_tokens
            assert config.policy.max_tokens_per_micro_batch >= 2 * longest  # a pair


def test_the_tiny_recipes_reward() -> None:
    reward = load(ROOT / "recipes/tiny-qwen2.yaml").reward
    weights = {name: term.weight for name, term in reward.terms.items()}
    assert weights == {"wrong": 0.2, "plausibility": 0.2, "coherence": 0.6}


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "small.yaml"
    path.write_text(
        "models: {backbone: some/where}\nreward: {terms: {coherence: {model: owner/judge}}}\nseed: 3\n"
    )
    return path


def test_recipe_overrides_schema_and_override_overrides_recipe(recipe: Path) -> None:
    assert load(recipe).seed == 3
    assert load(recipe, ["seed=4", "rl.optimizer.learning_rate=0.5"]).rl.optimizer.learning_rate == 0.5
    assert load(recipe).rl.steps == Config().rl.steps
    assert load(recipe, ["policy.dtype=bfloat16"]).policy.dtype is Dtype.bfloat16


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("rl.stepz=3", ("rl.stepz", "unknown key", "did you mean rl.steps?")),
        ("reward.terms.coherence.wight=1", ("unknown key", "reward.terms.coherence.weight")),
        ("rl.steps=many", ("rl.steps", "many")),
        ("preference.margin=half", ("preference.margin", "half", "first_divergent_token")),
        ("preference.loss=dpo", ("preference.loss", "dpo", "sigmoid")),
        (
            "preference.label_smoothing=0.1",
            ("preference.label_smoothing", "loss=sigmoid", "it reads beta", "cdpo or robust"),
        ),
        ("preference.target_margin=0.5", ("preference.target_margin", "simpo")),
        ('models.backbone=""', ("models.backbone", "Hub id")),
        ("reverse_rl.start=path", ("reverse_rl.start", "models.generator")),
        ("mixture.starts=[path]", ("mixture.starts", "models.generator")),
        ("mixture.starts=[target,target]", ("mixture.starts", "target, target", "once")),
        ("mixture.sources=[rs,rs]", ("mixture.sources", "rs, rs", "once")),
        ("mixture.sources=[]", ("mixture.sources", "at least one", "[pns,rs]")),
        ("mixture.sources=[rs,mixed]", ("mixture.sources", "[rs, mixed]", "of their own")),
        ("data.source=jsonl", ("data.jsonl.train",)),
        ("policy.dtype=int8", ("policy.dtype", "int8", "bfloat16")),
        ("policy.lora.targets=[]", ("policy.lora.targets", "all-linear")),
        ("rl.optimizer.schedule=linear", ("rl.optimizer.schedule", "linear", "cosine")),
        ("data.prompt=gpt", ("data.prompt", "gpt", "qwen", "auto")),
        ("tracking.backends=[carbon]", ("tracking.backends", "carbon", "tensorboard")),
        ("name=a/b", ("name", "a/b")),
        ("seed", ("seed", "key=value")),
        # what one key says of another
        ("reward.gates.malformed=5", ("reward.gates.malformed: 5.0", "at most 0.0")),
        ("reward.gates.malformed=null", ("reward.gates.malformed", "give it a number")),
        ("reward.gates.correct=2", ("reward.gates.correct: 2.0", "less than", "1.0")),
        ("reward.gates.corect=0", ("reward.gates.corect", "no gate", "did you mean correct?")),
        ("reward.terms.plausibility.when=correct", ("plausibility.when", "never hold", "no right answer")),
        ("reward.terms.wrong.model=owner/name", ("reward.terms.wrong.model", "kind verdict", "remove")),
        ("reward.terms.coherence.shortest=5", ("coherence.shortest", "not read", "judge")),
        ("reward.terms.own={kind: length, weight: 1}", ("reward.terms.own", "shortest and longest")),
        (
            "reward.terms.own={kind: length, weight: 1, shortest: 9, longest: 3}",
            ("reward.terms.own.longest: 3", "at least shortest, 9"),
        ),
        (
            "reward.terms.own={kind: judge, weight: 1, model: owner/judge}",
            ("reward.terms.own is reward.terms.coherence again",),
        ),
        (
            "reward.terms.coherence={endpoint: {url: 'http://a'}, pool: {replicas: 2}}",
            ("reward.terms.coherence.pool", "deadline_seconds alone"),
        ),
        ("reward.terms.coherence.endpoint.url=host:80", ("endpoint.url: 'host:80'", "http://")),
        (
            "reward.terms.coherence={endpoint: {url: 'http://a'}, grading: expected}",
            ("reward.terms.coherence.grading", "probabilities", "likeliest"),
        ),
        ('reward.terms.coherence.model=""', ("reward.terms.coherence.model", "coherence.weight=0")),
        ("reward.terms.policy.weight=1", ("reward.terms.policy", "rollout, policy, verifier")),
        ("reward.terms.Two-words.weight=1", ("reward.terms.Two-words", "plain word")),
        ("reverse_rl.stop_term=beauty", ("stop_term: 'beauty'", "plausibility", "stop_patience=0")),
        ("reward.terms.plausibility.weight=0", ("stop_term: 'plausibility'", "there are: coherence")),
        ("pair.scored_by=coherence", ("pair.scored_by: 'coherence'", "reward_model: plausibility")),
        (
            "reverse_rl={refresh_every: 5, stop_term: coherence}\nreward.terms.plausibility.weight=0",
            ("reverse_rl.refresh_every", "own reward model"),
        ),
        ("placement.rollout.gpus=1.5", ("placement.rollout.gpus: 1.5", "whole")),
        (
            "reward.terms.coherence.pool.gpus=2",
            ("coherence.pool.gpus: 2.0", "splits no model", "engine=vllm"),
        ),
        (
            "reward.terms.plausibility.pool.engine=vllm",
            ("plausibility.pool.engine", "judges", "transformers"),
        ),
        ("placement.rollout.labels={zone: ''}", ("placement.rollout.labels: 'zone'", "value")),
        ("placement.policy.resources={slot: 1.5}", ("placement.policy.resources.slot: 1.5", "whole")),
        (
            "reward.terms.coherence.pool.min_replicas=2",
            ("min_replicas: 2 is more", "replicas, 1", "1 or less"),
        ),
        (
            "reward.terms.coherence.pool={replicas: 3, max_replicas: 2}",
            ("max_replicas: 2 is less", "replicas, 3", "3 or more"),
        ),
        ("reward.terms.coherence.pool.resources={GPU: 1}", ("no custom resource", "coherence.pool.gpus")),
        ("reward.terms.coherence.pool.resources={slot: 1.5}", ("resources.slot: 1.5", "whole")),
        ("reward.terms.coherence.pool.labels={zone: ''}", ("coherence.pool.labels: 'zone'", "value")),
        ("placement.policy.gpus=2", ("placement.policy.gpus: 2.0", "replicas")),
        ("placement.colocate=[rollout]", ("placement.colocate: [rollout] must be", "[rollout,policy] or []")),
        ("placement.colocate=[rollout,coherence]", ("[rollout, coherence] must be", "only these two roles")),
        (
            "placement={colocate: [rollout,policy], policy: {replicas: 4}, rollout: {replicas: 1, gpus: 2}}",
            ("rollout has 1 x 2 GPUs and policy 4 ranks", "set placement.policy.replicas=2"),
        ),
        (
            "placement={colocate: [rollout,policy], rollout: {gpus: 0.5}}",
            ("rollout has 0.5 GPUs a replica", "placement.rollout.gpus to 1 or more, whole"),
        ),
        (
            "placement={colocate: [rollout,policy], rollout: {labels: {zone: a}}}",
            ("placement.colocate: the two roles lie on the same nodes", "labels of placement.policy"),
        ),
        (
            "placement={colocate: [rollout,policy], policy: {replicas: 6}, rollout: {replicas: 3, gpus: 2}}"
            "\npolicy.fsdp_size=3",
            ("policy.fsdp_size: 3 is no multiple of placement.rollout.gpus, 2", "raise it"),
        ),
        ("policy.fsdp_size=2", ("policy.fsdp_size: 2 does not divide", "replicas, 1", "set it to")),
    ],
)
def test_wrong_configuration_is_one_line(recipe: Path, override: str, words: tuple[str, ...]) -> None:
    with pytest.raises(UserError) as caught:
        load(recipe, override.split("\n"))
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message


@pytest.mark.parametrize(
    ("key", "value", "must_be"),
    [
        ("reward.terms.coherence.weight", "-5", "0 or more"),
        ("reward.terms.own.weight", "-1", "0 or more"),
        ("reward.terms.wrong.weight", ".nan", "finite and 0 or more"),
        ("reward.gates.malformed", "-.inf", "finite"),
        ("reward.max_masked_fraction", "1.5", "in [0, 1]"),
        ("reward.deadline_seconds", "0", "greater than 0"),
        ("rl.steps", "0", "1 or more"),
        ("rl.completions_per_problem", "1", "2 or more"),
        ("rl.clip_low", "-1", "in [0, 1]"),
        ("rl.clip_high", "-0.1", "0 or more"),
        ("rl.kl_coefficient", ".inf", "finite and 0 or more"),
        ("rl.temperature", "0", "greater than 0"),
        ("rl.top_p", "0", "in (0, 1]"),
        ("rl.optimizer.beta1", "2", "in [0, 1)"),
        ("rl.optimizer.beta2", "1", "in [0, 1)"),
        ("rl.optimizer.clip_grad", "0", "greater than 0"),
        ("rl.optimizer.weight_decay", "-0.1", "0 or more"),
        ("rl.optimizer.learning_rate", ".nan", "finite and 0 or more"),
        ("reverse_rl.stop_patience", "-1", "0 or more"),
        ("reverse_rl.stop_wrong_rate", "2", "in [0, 1]"),
        ("pair.max_length_ratio", "0", "1 or more"),
        ("reward_model.max_length_ratio", "0.5", "1 or more"),
        ("reward_model.held_out_fraction", "1", "in [0, 1)"),
        ("synthesize.min_quantile", "1", "in [0, 1)"),
        ("synthesize.temperature", "-1", "0 or more"),
        ("synthesize.min_log_prob", "0.5", "0 or less"),
        ("pair.perplexity_samples", "-1", "0 or more"),
        ("rollout.memory_fraction", "0", "in (0, 1]"),
        ("rollout.kv_cache_gib", "0", "greater than 0"),
        ("placement.policy.replicas", "0", "1 or more"),
        ("placement.rollout.gpus", "-1", "0 or more"),
        ("reward.terms.coherence.pool.cpus", "-1", "0 or more"),
        ("evaluate.generator_samples", "0", "1 or more"),
        ("evaluate.samples_per_problem", "0", "1 or more"),
        ("evaluate.per_suite.own.top_p", "1.5", "in (0, 1]"),
        ("data.max_prompt_tokens", "0", "1 or more"),
        ("policy.lora.rank", "-1", "0 or more"),
        ("seed", "-1", "in [0, 4294967295]"),
        ("preference.beta", "0", "greater than 0"),
        ("preference.beta", ".nan", "finite and greater than 0"),
        ("preference.label_smoothing", "0.5", "in [0, 0.5)"),
        ("preference.max_skipped_updates", "-1", "0 or more"),
    ],
)
def test_absurd_numbers_are_refused(recipe: Path, key: str, value: str, must_be: str) -> None:
    with pytest.raises(UserError) as caught:
        load(recipe, [f"{key}={value}"])
    message = str(caught.value)
    assert message.startswith(f"{key}: {'-' if value.startswith('-') else ''}")
    assert message.endswith(f" must be {must_be}")


@pytest.mark.parametrize(
    ("loss", "key", "value", "words"),
    [
        ("cdpo", "label_smoothing", "0.5", ("[0, 0.5)",)),
        ("robust", "label_smoothing", "-0.1", ("[0, 0.5)",)),
        ("rpo", "nll_weight", "-1", ("0 or more",)),
        ("simpo", "target_margin", ".inf", ("inf", "0 or more")),
        ("kto", "desirable_weight", "0", ("greater than 0",)),
        ("orpo", "beta", "0.1", ("loss=orpo", "it reads odds_ratio_weight")),
        ("offset", "offset_scale", "-1", ("0 or more",)),
    ],
)
def test_hyper_parameters_of_losses_have_ranges(
    recipe: Path, loss: str, key: str, value: str, words: tuple[str, ...]
) -> None:
    with pytest.raises(UserError) as caught:
        load(recipe, [f"preference.loss={loss}", f"preference.{key}={value}"])
    for word in (f"preference.{key}", *words):
        assert word in str(caught.value)


def test_hyper_parameters_are_filled_in(recipe: Path) -> None:
    for loss, entry in PREFERENCE_LOSSES.items():
        defaults = dict(entry.defaults)
        settings = load(recipe, [f"preference.loss={loss}"]).preference
        assert {name: getattr(settings, name) for name in defaults} == defaults


def test_terms_are_added_and_switched_off(recipe: Path) -> None:
    second = ["reward.terms.second.weight=0.5", "reward.terms.second.model=owner/scorer"]
    assert list(load(recipe, second).reward.terms) == ["wrong", "plausibility", "coherence", "second"]
    no_judge = ["reward.terms.coherence.weight=0", 'reward.terms.coherence.model=""']
    assert load(recipe, no_judge).reward.terms["coherence"].weight == 0
    load(recipe, ["reverse_rl.stop_patience=0", "reverse_rl.stop_term=none"])
    load(recipe, ["reverse_rl.stop_term=coherence", "reward.terms.plausibility.weight=0"])
    with pytest.raises(UserError, match=r"quantile_term: 'beauty'.*min_quantile=0"):
        load(recipe, ["synthesize.min_quantile=0.5", "synthesize.quantile_term=beauty"])


def test_a_range_of_log_probabilities_and_starts_of_what_is_not_there(recipe: Path) -> None:
    with pytest.raises(UserError, match=r"synthesize.min_log_prob: -1.0 is above max_log_prob, -2.0; .*null"):
        load(recipe, ["synthesize.min_log_prob=-1", "synthesize.max_log_prob=-2"])
    assert load(recipe, ["synthesize.max_log_prob=-2"]).synthesize.min_log_prob is None
    with pytest.raises(UserError, match=r"mixture.starts are of source pns, .*add it"):
        load(recipe, ["mixture.sources=[rs]", "mixture.starts=[target]"])


def test_the_reward_is_checked_where_it_is_asked(tmp_path: Path) -> None:
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text("")
    no_judge = ["models.backbone=owner/model"]
    load(None, no_judge, training=False)
    load(None, [*no_judge, f"preference.data.path={pairs}"])
    with pytest.raises(UserError, match=r"reward\.terms\.coherence\.model is empty"):
        load(None, no_judge)


def test_missing_and_malformed_recipe(tmp_path: Path) -> None:
    (tmp_path / "there.yaml").write_text("seed: [1\n")
    (tmp_path / "list.yml").write_text("- 1\n")
    (tmp_path / "lost.yml").write_text("extends: nowhere.yaml\n")
    with pytest.raises(UserError, match=r"does not exist; there are: .*there\.yaml"):
        load(tmp_path / "absent.yaml")
    with pytest.raises(UserError, match="not valid YAML"):
        load(tmp_path / "there.yaml")
    with pytest.raises(UserError, match="is a list"):
        load(tmp_path / "list.yml")
    with pytest.raises(UserError, match=r"extends: .*nowhere\.yaml does not exist"):
        load(tmp_path / "lost.yml")


def test_paths_are_relative_to_the_file_that_says_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, own, working = (tmp_path / name for name in ("base", "own", "working"))
    for directory in (base / "judge", own / "model", working):
        directory.mkdir(parents=True)
    for file in (base / "train.jsonl", own / "suite.jsonl", working / "other.jsonl"):
        file.write_text("")
    (base / "base.yaml").write_text(
        "models: {backbone: hub-owner/model, reward_model: judge}\n"
        "reward: {terms: {coherence: {model: '${models.reward_model}'}}}\n"
        "data: {source: jsonl, jsonl: {train: train.jsonl, reward: gsm8k_train}}\n"
        "runs: results\n"
    )
    (own / "own.yaml").write_text(
        "extends: ../base/base.yaml\n"
        "models: {generator: model}\n"
        "data: {jsonl: {suites: {mine: suite.jsonl}}, root: sets}\n"
    )
    monkeypatch.chdir(working)
    config = load("../own/own.yaml", ["data.jsonl.suites.other=other.jsonl", "models.backbone=./mine"])
    assert config.models.backbone == str(working / "mine")
    assert config.models.generator == str(own / "model")
    assert config.models.reward_model == str(base / "judge")
    assert config.reward.terms["coherence"].model == str(base / "judge")
    assert config.data.jsonl.train == str(base / "train.jsonl")
    assert config.data.jsonl.reward == "gsm8k_train"
    suites = {"mine": str(own / "suite.jsonl"), "other": str(working / "other.jsonl")}
    assert config.data.jsonl.suites == suites
    assert config.data.root == str(own / "sets")
    assert config.runs == str(base / "results")
    assert load("../own/own.yaml", ["runs=here"]).runs == str(working / "here")
    assert load("../own/own.yaml").models.backbone == "hub-owner/model"


@pytest.mark.parametrize(
    ("value", "named", "resolved"),
    [
        ("", True, ""),
        ("", False, ""),
        ("Qwen/Qwen2.5-0.5B", True, "Qwen/Qwen2.5-0.5B"),  # a dot is no file's suffix
        ("gpt2", True, "gpt2"),
        ("gpt2", False, "{here}/gpt2"),
        ("there", True, "{here}/there"),
        ("there/absent", True, "{here}/there/absent"),  # the folder exists: more likely a slip than a Hub id
        ("./gpt2", True, "{here}/gpt2"),
        ("../gpt2", True, "{parent}/gpt2"),
        ("~/gpt2", True, "{home}/gpt2"),
        ("/models/gpt2", True, "/models/gpt2"),
        ("train.jsonl.gz", True, "{here}/train.jsonl.gz"),
    ],
)
def test_path_or_name(tmp_path: Path, value: str, named: bool, resolved: str) -> None:
    (tmp_path / "there").mkdir()
    expected = resolved.format(here=tmp_path, parent=tmp_path.parent, home=Path.home())
    assert resolve_path(value, tmp_path, named) == expected


def test_settings_of_tiny_make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)

    def make(*words: str) -> WarmStart:
        settings = merge_layers(WarmStart, [override_layer(list(words))], "pns tiny make")
        check_settings(settings)
        return settings

    made = make("architecture=llama", "task=judge", "samples_from=./solver")
    assert (made.architecture, made.samples_from) == (Architecture.llama, str(tmp_path / "solver"))
    for words, message in (
        (["architecture=gpt2"], "architecture: .*gpt2.*qwen3"),
        (["heads=3"], "hidden_size: 128 must be an even multiple of heads, 3"),
        (["hidden_size=4"], "even multiple"),
        (["key_value_heads=3"], "heads: 4 must be a multiple of key_value_heads, 3"),
        (["init_std=0"], r"init_std: 0.0 must be in \(0, 1\]"),
        (["init_std=5"], r"init_std: 5.0 must be in \(0, 1\]"),
        (["heads=0"], "heads: 0 must be 1 or more"),
        (["task=judge"], "samples_from is empty"),
        (["optimiser.beta1=0"], "optimiser: unknown key .*did you mean optimizer"),
    ):
        with pytest.raises(UserError, match=message):
            make(*words)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["rl.top_p=0.9"], r"rl.top_p: 0.9; .*set it to 1, and use the temperature"),
        (["reverse_rl.importance_cap=2", "reverse_rl.temperature=0.7"], r"reverse_rl.importance_cap: 2.0; "),
        (["rl.overlap=true"], r"rl.overlap: clipping does not bound .*: set rl.importance_cap, e.g. to 2"),
        (
            ["rl.overlap=true", "rl.importance_cap=2", "placement.colocate=[rollout,policy]"],
            r"rl.overlap: rollout and policy take turns on the same GPUs .*set it to false, or placement.col",
        ),
        (
            ["reverse_rl.overlap=true", "reverse_rl.importance_cap=2", "reverse_rl.refresh_every=5"],
            r"reverse_rl.overlap: the reward model changes between two steps: .* reverse_rl.refresh_every=0",
        ),
        (["rl.ratio=sequence", "rl.dual_clip=3"], "rl.dual_clip is read by rl.ratio=token alone"),
        (["rl.dual_clip=1.2"], r"rl.dual_clip: 1.2 must be 0, or above 1 \+ clip_high \(1.28\)"),
        (["rl.overlong_tokens=5000"], "rl.overlong_tokens: 5000 is more than rollout.max_new_tokens, 2048"),
    ],
)
def test_settings_of_rl_that_do_not_fit_each_other(words: list[str], message: str) -> None:
    base = ["models.backbone=somewhere", "reward.terms.coherence.weight=0"]
    with pytest.raises(UserError, match=message):
        load(None, [*base, *words])


def test_files_over_a_recipe(tmp_path: Path) -> None:
    """Later ones over earlier ones, `key=value` over all, paths relative to the file that says them."""
    recipe = ROOT / "recipes/tiny-qwen2.yaml"
    (tmp_path / "base.yaml").write_text("placement: {rollout: {replicas: 3, cpus: 2}}\nruns: results\n")
    (tmp_path / "one.yaml").write_text("extends: base.yaml\nplacement: {rollout: {replicas: 4}}\n")
    (tmp_path / "two.yaml").write_text("placement: {policy: {replicas: 5}}\n")
    files = [tmp_path / "one.yaml", tmp_path / "two.yaml"]
    config = load(recipe, ["placement.policy.cpus=7"], over=files)
    placement = config.placement
    assert (placement.rollout.replicas, placement.rollout.cpus) == (4, 2)
    assert (placement.policy.replicas, placement.policy.cpus) == (5, 7)
    assert config.runs == str(tmp_path / "results")
    assert config.name == "tiny-qwen2"
    assert config.rl == load(recipe).rl
    (tmp_path / "two.yaml").write_text("placement: {polcy: {replicas: 5}}\n")
    with pytest.raises(UserError, match=r"placement.polcy: unknown key \(in .*two.yaml or an override\)"):
        load(recipe, over=files)
    with pytest.raises(UserError, match=r"none.yaml does not exist; there are: .*one.yaml"):
        load(recipe, over=[tmp_path / "none.yaml"])
