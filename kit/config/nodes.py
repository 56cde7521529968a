"""How many nodes, and how many processes on each: from DeepSpeed's hostfile and its filters, or as it is said."""

from __future__ import annotations

import re
from pathlib import Path

from kit.config.report import Report
from kit.errors import KitError
from kit.schema.run_plan import Launch
from kit.system import hardware

HOSTFILE_LINE = re.compile(r"^(\S+)\s+slots=([0-9]+)\s*(#.*)?$")
MAX_SLOTS = 1024  # slots of one host: more is a slip of the finger, and each is a number in a list
Hosts = dict[str, list[int]]  # in the file's order; the numbers of the GPUs


class HostfileError(ValueError):
    """What is wrong with a hostfile or a filter: the message, the key, and the fix."""

    def __init__(self, text: str, key: str, fix: str) -> None:
        super().__init__(text)
        self.key, self.fix = key, fix


def resolve_nodes(launch: Launch, world_size: int | None, report: Report) -> Launch:
    """Resolve num_nodes, and num_gpus where a hostfile or a filter gives it. `world_size`: processes that run already.

    DeepSpeed takes nodes of unequal size; the plan has one number for all, so they are refused.
    """
    nodes = launch.num_nodes
    if not (launch.hostfile or launch.include or launch.exclude) or world_size is not None:
        return launch.model_copy(update={"num_nodes": 1 if nodes == "auto" else nodes})
    try:
        if launch.hostfile:
            hosts = read_hostfile(Path(launch.hostfile).expanduser())
        else:
            hosts = {"localhost": list(range(len(hardware.list_gpus()) or count_slots_in_filter(launch)))}
        count, each = count_processes(filter_hosts(hosts, launch.include, launch.exclude), launch)
    except HostfileError as wrong:
        report.problem(f"launch.{wrong.key}", str(wrong), wrong.fix, "hostfile")
        return launch.model_copy(update={"num_nodes": 1})
    return launch.model_copy(update={"num_nodes": count, "num_gpus": each})


def read_hostfile(path: Path) -> Hosts:
    """The hosts of a file and the GPUs of each, as DeepSpeed reads it."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8"
        raise HostfileError(f"{path} cannot be read: {reason}", "hostfile", "check the path") from None
    hosts: Hosts = {}
    for number, line in enumerate(lines, 1):
        if not line.strip() or line.strip().startswith("#"):
            continue
        match = HOSTFILE_LINE.match(line.strip())
        if not match or int(match[2]) < 1:
            raise HostfileError(f"{path}:{number} is not a line of a hostfile: {line.strip()[:80]!r}", "hostfile",
                        "one line for each node: HOST slots=GPUS")  # fmt: skip
        if not re.fullmatch(r"[A-Za-z0-9:][A-Za-z0-9._:@-]*", match[1]):  # it is put into a command line for ssh
            raise HostfileError(f"{path}:{number}: {match[1]!r} is no host's name", "hostfile", "HOST slots=GPUS")
        if int(match[2]) > MAX_SLOTS:
            raise HostfileError(f"{path}:{number}: more than {MAX_SLOTS} slots", "hostfile", "slots=GPUS of that node")
        if match[1] in hosts:
            raise HostfileError(f"{path}:{number} names {match[1]} again", "hostfile", "one line for each node")
        hosts[match[1]] = list(range(int(match[2])))
    if not hosts:
        raise HostfileError(f"{path} names no host", "hostfile", "one line for each node: HOST slots=GPUS")
    return hosts


def read_hosts(launch: Launch) -> Hosts:
    """What the hostfile and its filters give at this moment; KitError where the file has gone or changed for worse."""
    try:
        return filter_hosts(read_hostfile(Path(str(launch.hostfile)).expanduser()), launch.include, launch.exclude)
    except HostfileError as wrong:
        raise KitError(str(wrong), f"launch.{wrong.key}", wrong.fix, rule="hostfile") from None


def filter_hosts(hosts: Hosts, include: str | None, exclude: str | None) -> Hosts:
    """What DeepSpeed's --include or --exclude leave of the hosts."""
    if include and exclude:
        raise HostfileError(
            "launch.include and launch.exclude are both given: DeepSpeed takes one", "exclude", "keep one"
        )
    key, text = ("include", include) if include else ("exclude", exclude)
    if not text:
        return hosts
    named: Hosts = {}
    for part in text.split("@"):
        host, _, slots = part.partition(":")
        if host not in hosts:
            raise HostfileError(
                f"launch.{key} names {host}, which is not among {', '.join(hosts)}", key, "check the name"
            )
        numbers = [int(n) for n in slots.split(",")] if slots else hosts[host]
        if wrong := [n for n in numbers if n not in hosts[host]]:
            raise HostfileError(
                f"{host} has no slot {wrong[0]}: they are 0 to {len(hosts[host]) - 1}", key, "check the slots"
            )
        named[host] = sorted({*named.get(host, []), *numbers})
    if include:
        return {host: named[host] for host in hosts if host in named}
    left = {host: [n for n in slots if n not in named.get(host, [])] for host, slots in hosts.items()}
    if not any(left.values()):
        raise HostfileError("launch.exclude leaves nothing", "exclude", "leave some of it out")
    return {host: slots for host, slots in left.items() if slots}


def count_processes(hosts: Hosts, launch: Launch) -> tuple[int, int]:
    """(nodes, processes on each) of what is chosen, cut to what is asked for."""
    nodes, count = launch.num_nodes, launch.num_gpus
    filtered = bool(launch.include or launch.exclude)  # DeepSpeed does not cut these down
    if nodes != "auto" and (nodes > len(hosts) or (filtered and nodes != len(hosts))):
        text = f"launch.num_nodes={nodes}, but the hostfile and its filters give {len(hosts)}"
        raise HostfileError(text, "num_nodes", f"leave it out: {len(hosts)}")
    nodes = len(hosts) if nodes == "auto" else nodes
    sizes = {len(slots) for slots in list(hosts.values())[:nodes]}
    if count == "auto" and len(sizes) > 1:
        raise HostfileError(f"the nodes have {', '.join(map(str, sorted(sizes)))} slots: all must have as many",
                            "hostfile",
                    f"launch.num_gpus={min(sizes)} takes as many on each")  # fmt: skip
    each = min(sizes) if count == "auto" else count
    if each > min(sizes) or (filtered and sizes != {each}):
        text = f"launch.num_gpus={each}, but the hostfile and its filters give {', '.join(map(str, sorted(sizes)))}"
        raise HostfileError(text, "num_gpus", f"launch.num_gpus={min(sizes)}, or leave it out")
    return nodes, each


def count_slots_in_filter(launch: Launch) -> int:
    """For a machine whose GPUs cannot be counted here: as many as a filter of localhost speaks of."""
    slots = (launch.include or launch.exclude or "").partition(":")[2]
    most = max((int(n) for n in slots.split(",") if n.isdecimal()), default=0)
    if most >= MAX_SLOTS:
        key = "include" if launch.include else "exclude"
        raise HostfileError(f"launch.{key} names slot {most}", key, f"the numbers of GPUs, below {MAX_SLOTS}")
    return most + 1


def starts_over_ssh(launch: Launch) -> bool:
    """Whether one command starts the ranks of all nodes."""
    return bool(launch.hostfile) and not launch.no_ssh and launch.launcher == "deepspeed"


def starts_by_node(launch: Launch) -> bool:
    """Whether each node is told its rank and starts its own ranks."""
    return launch.num_nodes not in (1, "auto") and not starts_over_ssh(launch)
