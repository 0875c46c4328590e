"""How a run is made.

A method of `pns.methods` is called with a `Plan`, which notes the steps; then those whose output is not there
are made.
"""

from collections.abc import Sequence
from pathlib import Path

from pns.algo.formatting import THINK_TAGS
from pns.algo.reward import reads_tokens
from pns.config import OWN, Config, Data, Method, PromptFamily, TermKind, Thinking, external_pairs
from pns.data.benchmarks import decodings
from pns.data.preference import load_pairs
from pns.data.problems import TRAINING, ProblemSets, load_problem_sets, num_repeated, removals
from pns.data.prompts import PROMPT_KEYS, Messages, Prompts, apply_family, check_vocabulary, load_tokenizer
from pns.errors import UserError, did_you_mean
from pns.files import sha256_of_json, write_json
from pns.methods import METHODS
from pns.recipe import study_arms
from pns.records import to_json
from pns.report.run_report import write_report
from pns.run.page import RunPage
from pns.run.place import STORE
from pns.run.stage import Contents, ModelFiles, Plan, Step
from pns.run.stopping import current_request
from pns.run.terminal import PlainTerminal, Terminal
from pns.stages.context import Problems, Suites, World
from pns.stages.evaluate import check_samplings
from pns.stages.negatives import SOURCES
from pns.stages.preference import preference
from pns.stages.session import session


def run(
    config: Config, first: str | None = None, last: str | None = None, terminal: Terminal | None = None
) -> Path:
    """Make what is missing of a run until `last`; `first` is made anew, and with it all that follows from it.

    Returns the run's page. Raises UserError before anything is started or written where the inputs are wrong.
    """
    terminal = terminal or PlainTerminal()
    check_source(config)
    if config.evaluate.endpoint.url:
        raise UserError("evaluate.endpoint.url: pns evaluate alone asks a server: leave it empty in a run")
    problem_sets = load_problem_sets(config)
    prompts = load_prompts(config)
    check_token_readers(config, prompts)
    world = make_world(config, problem_sets)
    check_samplings(prompts, world.suites)
    with RunPage.open(Path(config.runs) / config.name) as page:
        # Under the lock: two starts with --from must not count to the same number.
        attempts = dict(page.attempts)
        if first:
            attempts[first] = attempts.get(first, 0) + 1
        plan = Plan(Path(config.runs) / STORE, config, prompts_digest(prompts), attempts)
        METHODS[config.method](plan, config, world)
        steps = plan.until(check_step(plan, last, "--until"))
        check_step(plan, first, "--from")
        make_steps(config, page, steps, prompts, attempts, problem_sets, terminal)
    return page.path


def make_steps(
    config: Config,
    page: RunPage,
    steps: list[Step],
    prompts: Prompts,
    attempts: dict[str, int],
    problem_sets: ProblemSets,
    terminal: Terminal,
) -> None:
    """Make the steps whose output is not there, and lead the page to all of them."""
    pending = [step for step in steps if not step.is_done()]
    if not pending and all(page.leads_to(step) for step in steps):
        # The run's end, which --quiet and --json show, too.
        terminal.summary([f"{page.path}: every stage is done; --from STAGE makes one again"], {})
        return
    if done := [step.name for step in steps if step not in pending]:
        terminal.note(f"done before: {', '.join(done)}")
    if pending:
        check_pairs(config, pending, prompts)
        with session(config, page, pending, prompts, attempts, terminal) as making:
            # Only now that all roles are up: a start that fails writes nothing.
            report_removals(page, problem_sets, terminal)
            report_repeats(config, problem_sets, terminal)
            for number, step in enumerate(steps, 1):
                if step.is_done():  # asked again at its turn: another run may have made it since
                    page.link(step)
                else:
                    making.make(step, number, len(steps))
    else:
        page.begin(config, attempts)
        for step in steps:
            page.link(step)
    current_request().way_out = lambda: f"every stage is done; pns report {page.path} writes the report"
    terminal.wait("report")
    write_report(page.path, terminal)


def check_pairs(config: Config, pending: Sequence[Step], prompts: Prompts) -> None:
    """Raises UserError for a file of pairs with one that the model does not read, a prompt too long for it
    among them, as the stage would with all actors up."""
    own = config.preference
    if external_pairs(config) and own.data.path and any(step.stage is preference for step in pending):
        policy = config.policy
        load_pairs(own, policy.max_tokens_per_micro_batch, policy.layout, prompts, {}, None)


def roles_used(config: Config) -> dict[str, tuple[str, ...]]:
    """Step -> the roles it uses, without reading a model or a problem."""
    nothing = Problems([])
    suites = Suites({}, {}, {}, Data())
    world = World(ModelFiles(config.models.backbone), nothing, nothing, nothing, suites)
    plan = Plan(Path(config.runs) / STORE, config, "", contents=Contents(None))
    METHODS[config.method](plan, config, world)
    return {step.name: step.roles for step in plan.steps}


def check_source(config: Config) -> None:
    """Raises UserError for an unknown source of negatives."""
    named = [("negatives", config.negatives), *(("mixture.sources", own) for own in config.mixture.sources)]
    for name, arm in config.bcpg.arms.items():
        named += [(f"bcpg.arms.{name}.negatives", source) for source in arm.negatives if source != OWN]
    if config.method is Method.study:
        named += [
            (f"study.arms.{name}: negatives", own.negatives) for name, own in study_arms(config).items()
        ]
    for key, source in named:
        if source not in SOURCES:
            hint = did_you_mean(source, SOURCES) or f"; there are {', '.join(SOURCES)}"
            raise UserError(f"{key}: {source!r} is no source of negatives{hint}")


def check_step(plan: Plan, name: str | None, option: str) -> str | None:
    """`name`, if it is None or steps of the plan are asked for as that. Raises UserError."""
    names = dict.fromkeys(step.asked_as for step in plan.steps)
    if name and name not in names:
        raise UserError(f"{option} {name}: the stages of this run are {', '.join(names)}")
    return name


def make_world(config: Config, sets: ProblemSets) -> World:
    """What the run begins with."""
    suites = Suites(sets.suites, sets.identities, decodings(config, sets.suites), config.data)
    parts = (sets.train, sets.reward, sets.preference)
    train, reward, preference = (Problems(part, sets.checker) for part in parts)
    return World(ModelFiles(config.models.backbone), train, reward, preference, suites)


def load_prompts(config: Config) -> Prompts:
    """The backbone's tokenizer with the prompt keys filled; `config.data.prompt` becomes the family."""
    tokenizer = load_tokenizer(config.models.backbone, config.models.trust_remote_code)
    config.data.prompt = apply_family(config.data, tokenizer.chat_template)
    return Prompts(tokenizer, config.data)


def check_token_readers(config: Config, prompts: Prompts) -> None:
    """Raises UserError for a reward model that would read the backbone's token ids as other tokens."""
    if external_pairs(config):
        return
    readers = {"models.reward_model": config.models.reward_model}
    for name, term in config.reward.terms.items():
        if term.kind is TermKind.reward_model and term.weight > 0 and reads_tokens(term):
            readers[f"reward.terms.{name}.model"] = term.model
    for key, path in readers.items():
        if path:
            check_vocabulary(path, prompts.tokenizer, key, config.models.trust_remote_code)


def load_messages(config: Config) -> Messages:
    """What a server is asked, whose tokenizer is not known here: with prompt auto, the problem and then the
    instruction in one turn, which every chat model reads. Raises UserError for what only a text can have."""
    data = config.data
    if data.prompt is PromptFamily.auto:
        data.prompt = PromptFamily.llama
    data.prompt = apply_family(data, "")
    if not data.chat_template or data.assistant_prefix:
        fault = "evaluate.endpoint takes turns: no data.assistant_prefix, and data.chat_template is true"
        raise UserError(f"{fault}: set data.prompt=auto, or evaluate the model's directory")
    return Messages(data)


def messages_digest(messages: Messages) -> str:
    """Of everything that makes messages of a problem."""
    data = messages.data
    keys = [*PROMPT_KEYS, "thinking", "think_tags"]
    return sha256_of_json(to_json([*(getattr(data, key) for key in keys), messages.examples]))


def prompts_digest(prompts: Prompts) -> str:
    """Of everything that makes token ids of a problem, and text of token ids."""
    data, tokenizer = prompts.data, prompts.tokenizer
    keys = [getattr(data, key) for key in (*PROMPT_KEYS, "max_prompt_tokens")]
    keys += [prompts.prefix, prompts.reasoning_block]
    # Only where they are set: what was made before there were such keys stays.
    if data.thinking is not Thinking.auto:
        keys.append(data.thinking)
    if tuple(data.think_tags) != THINK_TAGS:
        keys.append(data.think_tags)
    if prompts.examples:
        keys.append(prompts.examples)
    special = to_json({name: str(token) for name, token in tokenizer.special_tokens_map.items()})
    # The backend's text has merges and normaliser as well; slow tokenizers have none.
    vocabulary = tokenizer.get_vocab() if tokenizer.is_fast is False else tokenizer.backend_tokenizer.to_str()
    return sha256_of_json([keys, vocabulary, tokenizer.chat_template, special])


def report_repeats(config: Config, problem_sets: ProblemSets, terminal: Terminal) -> None:
    """Say of each file of training problems how many texts are in it more than once."""
    own = config.data.jsonl
    for part in TRAINING:
        name = getattr(own, part)
        if name and (num := num_repeated(getattr(problem_sets, part))):
            terminal.note(f"data.jsonl.{part}: {num} problems have the text of an earlier one; they are kept")


def report_removals(page: RunPage, problem_sets: ProblemSets, terminal: Terminal) -> None:
    """Write what decontamination left out to decontamination.json, and say it in one line."""
    if problem_sets.removed:
        removed = removals(problem_sets.removed)
        file = page.path / "decontamination.json"
        write_json(file, removed)
        counts = ", ".join(f"{part} {values['problems']}" for part, values in removed.items())
        terminal.note(f"decontamination: problems removed because a suite has them: {counts} ({file})")
