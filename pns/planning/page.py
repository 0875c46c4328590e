"""A plan for people, in 100 columns; and the same as JSON."""

import textwrap
from collections import Counter
from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from pns.fields import walk_keys
from pns.planning.assumptions import Assumptions
from pns.planning.faults import faults, remarks
from pns.planning.memory import Parts, total
from pns.planning.plan import Estimate, StageTime
from pns.planning.shapes import KnownModel
from workers.packing import counted
from workers.placement import environments

WIDTH = 100


def print_plan(plan: Estimate, title: str, price: float, with_assumptions: bool) -> None:
    """Tables to stdout; `price` of a GPU for an hour, 0: not known."""
    console = Console(width=WIDTH, highlight=False, soft_wrap=False)

    def say(line: str, style: str = "") -> None:
        console.print(Text(line, style=style))

    say(title, "bold")
    for line in header(plan):
        say(wrapped(line))
    console.print(role_table(plan))
    say(total_line(plan))
    for line in memory_lines(plan):
        say(wrapped(line))
    if plan.nodes:
        say("machines, with one placement that there is:")
        console.print(node_table(plan))
    else:
        host = plan.host["this machine"]
        say(wrapped(f"host memory: {total(host):.1f} GB of {plan.machine_gb:.1f} = {spell(host)}"))
    say(wrapped(f"disk (runs): {total(plan.disk):.1f} GB = {spell(plan.disk)}"))
    say("environment variables of each process:")
    for line in environment_lines(plan):
        say(wrapped(line))
    say("stages, tokens and seconds for one time (sampling and scoring go on at once):")
    console.print(time_table(plan))
    for line in cost_lines(plan, price):
        say(line)
    for line in remarks(plan):
        say(wrapped(f"note: {line}"))
    for line in faults(plan):
        say(wrapped(f"DOES NOT FIT: {line}"), "bold red")
    if with_assumptions:
        console.print(assumption_table(plan.cluster.assumptions if plan.cluster else Assumptions()))


def wrapped(line: str) -> str:
    """In lines of WIDTH, further ones indented."""
    indent = " " * (len(line) - len(line.lstrip()) + 4)
    return textwrap.fill(line, WIDTH, subsequent_indent=indent, break_on_hyphens=False, drop_whitespace=True)


def header(plan: Estimate) -> list[str]:
    lines = []
    roles_of: dict[KnownModel | None, list[str]] = {}
    for name, found in plan.models.items():
        roles_of.setdefault(found, []).append(name)
    for found, names in roles_of.items():
        said = "shape not known"
        if found is not None:
            said = f"{found.name}, {found.shape.parameters / 1e9:.3g} B parameters ({found.source})"
        lines.append(f"model    {said}: {', '.join(names)}")
    if plan.cluster is None:
        lines.append("device   cpu of this machine (--gpu KIND or --cluster FILE plans for GPUs)")
    else:
        kinds = Counter(gpu.kind for node in plan.nodes for gpu in node.gpus)
        said = ", ".join(
            f"{num} x {kind.name} ({kind.memory_gb:g} GB, {kind.bandwidth_gb_s:g} GB/s, "
            f"{kind.tflops:g} TFLOPS)"
            for kind, num in kinds.items()
        )
        assumed = "" if plan.stated else "; assumed, --gpu KIND or --cluster FILE say others"
        lines.append(f"device   cuda: {said}{assumed}")
    own = plan.lengths
    means = f"prompts {own.prompt} tokens (at most {own.max_prompt}), completions {own.completion} (at most "
    lines.append(f"lengths  assumed means: {means}{own.max_completion})")
    return lines


def role_table(plan: Estimate) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for name, justify in (("role", "left"), ("replicas", "right"), ("GPUs", "right"), ("CPUs", "right")):
        table.add_column(name, justify=justify)  # type: ignore[arg-type]
    table.add_column("GB a GPU" if plan.cluster else "GB each", justify="right")
    table.add_column("stages", overflow="fold")
    for b in plan.placed:
        stages = [stage for stage, own in plan.stages.items() if b.role in own.roles]
        peak = plan.peak(b.role)
        replicas = f"{b.replicas}-{b.most}" if b.most > b.replicas else str(b.replicas)
        row = (b.role, replicas, *(f"{b.amounts[unit]:g}" for unit in ("GPU", "CPU")))
        table.add_row(*row, f"{peak:.1f}" if peak else "?", " ".join(stages))
    return table


def total_line(plan: Estimate) -> str:
    cpus = sum(b.replicas * b.amounts["CPU"] for b in counted(plan.placed))
    verifiers = plan.config.placement.verifier_processes
    inside = "".join(f"; {b.role} is on the {b.inside}'s" for b in plan.placed if b.inside)
    return f"total: {plan.num_gpus:g} GPUs, {cpus:g} CPUs; {verifiers} verifier processes{inside}"


def memory_lines(plan: Estimate) -> list[str]:
    """Each role's memory by part, one line a set of stages with the same."""
    lines = ["memory, GB of each GPU at its fullest:" if plan.cluster else "memory, GB of each process:"]
    for own in plan.memory:
        stages = "" if own.role not in ("policy", "rollout") else f" ({', '.join(own.stages)})"
        note = f"; {own.note}" if own.note else ""
        lines.append(f"  {own.role}{stages}: {own.gb:.1f} = {spell(own.parts)}{note}")
    assumed = plan.cluster.assumptions if plan.cluster else None
    for b in plan.placed:
        if b.inside and assumed is not None:
            gb = plan.gpu_gb(b.inside, assumed)
            kept = f"{plan.asleep_gb(assumed):.1f} and {assumed.context_gb:.1f}"
            lines.append(f"  {b.role} and {b.inside} in turns: {gb:.1f}; {kept} stay of the one that is away")
    return lines


def spell(parts: Parts) -> str:
    """weights 3.8 + Adam 7.6; what is less than half a tenth is left out."""
    shown = [f"{name} {value:.1f}" for name, value in parts.items() if value >= 0.05]
    return " + ".join(shown) or "0.0"


def node_table(plan: Estimate) -> Table:
    """One placement that there is, and the host memory that it takes; like machines in one row."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for name in ("machine", "processes", "host memory, GB at its fullest"):
        table.add_column(name, overflow="fold")
    rows: dict[tuple[str, str], list[str]] = {}
    for node in plan.nodes:
        parts = plan.host.get(node.name, {})
        known = f" of {node.type.memory_gb:g}" if node.type.memory_gb else ""
        memory = f"{total(parts):.0f}{known} = {spell(parts)}" if parts else "0"
        rows.setdefault((node.described(), memory), []).append(node.name)
    for (processes, memory), names in rows.items():
        several = f"{names[0]} to {names[-1]}" if len(names) > 1 else names[0]
        table.add_row(several, processes, memory)
    return table


def time_table(plan: Estimate) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("stage")
    for name in ("times", "sampled", "scored", "trained"):
        table.add_column(name, justify="right")
    timed = plan.cluster is not None
    if timed:
        table.add_column("seconds", justify="right")
        table.add_column("of which")
    for time in plan.times:
        row = [f"{time.stage}: {time.phase}", str(time.times)]
        row += [count(time.sampled_tokens), count(time.scored), count(time.trained_tokens)]
        if timed:
            row += ["?" if time.once is None else f"{time.once:.1f}", parts_of(time)]
        table.add_row(*row)
    return table


def count(number: int) -> str:
    """1234567 as 1.2M; nothing for 0."""
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.1f}{unit}"
    return str(number) if number else ""


def parts_of(time: StageTime) -> str:
    """Seconds by part, the longest first."""
    ordered = sorted((time.seconds or {}).items(), key=lambda part: part[1], reverse=True)
    return ", ".join(f"{name} {value:.1f}" for name, value in ordered if value >= 0.05)


def stage_costs(plan: Estimate) -> list[tuple[str, float | None, str]]:
    """(stage, hours or None, what bounds it)."""
    costs = []
    for stage in (name for name, own in plan.stages.items() if own.phases):
        seconds = plan.seconds(stage)
        costs.append((stage, None if seconds is None else seconds / 3600, plan.bound(stage)))
    return costs


def cost_lines(plan: Estimate, price: float) -> list[str]:
    """Hours, GPU hours (all GPUs are held until the run ends) and price of each stage and of the run."""
    if plan.cluster is None:
        return ["times are told for GPUs alone"]
    lines, hours = [], 0.0
    width = max(14, *(len(stage) + 1 for stage in plan.stages))
    for stage, own, bound in stage_costs(plan):
        if own is None:
            lines.append(f"  {stage:<{width}}not known")
            continue
        hours += own
        money = f"{own * plan.num_gpus * price:9.0f}" if price else ""
        lines.append(
            f"  {stage:<{width}}{own:8.2f} h{own * plan.num_gpus:10.1f} GPU-hours{money}   bound by {bound}"
        )
    money = f"{hours * plan.num_gpus * price:9.0f}" if price else ""
    lines.append(f"  {'total':<{width}}{hours:8.2f} h{hours * plan.num_gpus:10.1f} GPU-hours{money}")
    return lines


def assumption_table(assumed: Assumptions) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for name in ("assumption", "value", "meaning", "source"):
        table.add_column(name, overflow="fold")
    for key in walk_keys(assumed):
        table.add_row(key.name, f"{key.value:g}", key.meaning, key.field.metadata["source"])
    return table


def environment_of(plan: Estimate) -> dict[str, dict[str, str]]:
    return environments(plan.config, [b.role for b in plan.placed], plan.device)


def environment_lines(plan: Estimate) -> list[str]:
    """A line for roles with the same."""
    roles_of: dict[str, list[str]] = {}
    for role, variables in environment_of(plan).items():
        said = " ".join(f"{name}={value}" for name, value in variables.items())
        roles_of.setdefault(said, []).append(role)
    return [f"  {', '.join(roles)}: {said or 'those of the node'}" for said, roles in roles_of.items()]


def as_json(plan: Estimate, price: float) -> dict[str, Any]:
    """All figures, in GB, seconds and GPU hours."""
    hours = stage_costs(plan) if plan.cluster else []
    return {
        "device": plan.device,
        "models": {name: asdict(found) if found else None for name, found in plan.models.items()},
        "lengths": asdict(plan.lengths),
        "stages": {stage: list(own.roles) for stage, own in plan.stages.items()},
        "roles": [asdict(b) for b in plan.placed],
        "environment": environment_of(plan),
        "num_gpus": plan.num_gpus,
        "memory_gb": [{**asdict(own), "gb": own.gb} for own in plan.memory],
        "nodes": [
            {"name": n.name, "processes": n.described(), "host_gb": plan.host[n.name]} for n in plan.nodes
        ],
        "host_gb": plan.host,
        "disk_gb": plan.disk,
        "times": [{**asdict(time), "once": time.once, "bound": time.bound} for time in plan.times],
        "costs": [
            {
                "stage": stage,
                "hours": own,
                "gpu_hours": None if own is None else own * plan.num_gpus,
                "price": None if own is None or not price else own * plan.num_gpus * price,
                "bound": bound,
            }
            for stage, own, bound in hours
        ],
        "notes": remarks(plan),
        "faults": faults(plan),
    }
