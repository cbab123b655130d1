"""The options of `thresher launch`, and those of `thresher serve` for what survives; defaults are in `cli`."""

from pathlib import Path
from typing import Annotated, Literal

from typer import Argument, Option

# Spelled out here too, because to import them from where they belong takes torch; a test compares the two.
RuleName = Literal["budget", "calibrated", "paper"]
PlacementName = Literal["gradient", "update"]
NonFiniteName = Literal["refuse", "skip"]
ModeName = Literal["sync", "ssp", "async"]
DownlinkName = Literal["updates", "shadow"]
DurabilityName = Literal["none", "process", "disk"]

Script = Annotated[list[str] | None, Argument(help="The training script and its arguments.")]
Shards = Annotated[int, Option(envvar="THRESHER_SHARD_COUNT", help="Shard processes.")]
Workers = Annotated[int, Option(envvar="THRESHER_WORKERS", help="Worker processes.")]
Seed = Annotated[int, Option(envvar="THRESHER_SEED", help="Keys data order and randomness.")]

# What is sent
Compressor = Annotated[str, Option(help="What is sent, such as 'TopK(0.01)'.")]
Threshold = Annotated[float | None, Option(help="λ of the hard threshold, in gradient units.")]
Density = Annotated[float | None, Option(help="Wanted mean density of the run; λ follows it.")]
Budget = Annotated[
    str | None, Option(help="Wanted bytes of the whole run, such as 500MB; λ follows it. Needs --steps.")
]
Precision = Annotated[float | None, Option(help="Wanted precision ε; λ = √(ε/parameters)/γ.")]
Rule = Annotated[RuleName, Option(help="How λ follows from --density.")]
Steps = Annotated[int | None, Option(help="Rounds of the whole run, where known.")]
Factors = Annotated[str | None, Option(help="Factors on λ, one for each worker: 1,1,2 spares the last one's uplink.")]
Placement = Annotated[PlacementName, Option(help="Compress gradients, or what the worker's optimizer has moved.")]
Period = Annotated[int, Option(help="Local steps per round; more than 1 needs --placement update.")]
Outer = Annotated[str, Option(help="Optimizer of the shards for what was moved, such as 'SGD(lr=0.7, momentum=0.9)'.")]
NonFinite = Annotated[NonFiniteName, Option(help="NaN or infinity in a gradient: refuse the step, or skip it.")]

# When rounds close
Mode = Annotated[
    ModeName,
    Option(help="sync: a round is a push of every worker; ssp and async: each push is a round of its own."),
]
Quorum = Annotated[int, Option(help="Of sync: pushes that close a round when --grace is over; 0 waits for all.")]
Grace = Annotated[float, Option(help="Seconds that a quorum waits for the others.")]
Staleness = Annotated[int, Option(help="Of ssp: steps that a worker may be ahead of the slowest.")]
MaxStaleness = Annotated[
    int, Option(help="A push computed on a version older than this returns to its worker; 0 takes all.")
]
Downlink = Annotated[
    DownlinkName, Option(help="Workers replay updates, or copy assignments to the shadow of the parameters.")
]
ShadowThreshold = Annotated[float, Option(help="How far the shadow may be from a parameter, in its unit.")]
MomentumPerPush = Annotated[
    bool, Option(help="Of ssp and async: momenta decay in N pushes as much as elsewhere in one round.")
]
StalenessAware = Annotated[
    bool, Option(help="Of ssp and async: a push staler than N versions is divided by its staleness.")
]
RoundTimeout = Annotated[float, Option(help="Seconds a round or an agreement waits for a connected worker.")]
Lease = Annotated[float, Option(help="Seconds a round waits for a worker that was lost; then the others go on.")]

# What survives
Durability = Annotated[
    DurabilityName,
    Option(help="What a kill leaves: none, nothing; process, all; disk, all when the machine fails too."),
]
Restarts = Annotated[int, Option(help="How often each process that was killed is started again.")]
RestartDelay = Annotated[
    float,
    Option(help="Seconds before a first restart; doubled for each further one, up to half the lease."),
]
Resume = Annotated[
    Path | None, Option(help="Folder of a stopped or failed run, which goes on where it was; no script then.")
]

# Of one shard, for `thresher serve`
StateDir = Annotated[Path | None, Option(help="Folder of what this shard must never forget; it goes on from there.")]
ShardDurability = Annotated[
    DurabilityName | None,
    Option(
        help="What of it survives. none: nothing, without --state-dir; process, with it: a kill of the shard; "
        "disk: also a crash of the machine, at the price of a sync before anybody is told."
    ),
]
CheckpointEvery = Annotated[
    int, Option(help="Rounds between two checkpoints; 0 writes none but the first and the last.")
]
Checkpoints = Annotated[int, Option(help="Checkpoints that are kept.")]

# The launch
Baseline = Annotated[bool, Option(help="Run once more with everything sent, and compare.")]
Name = Annotated[str | None, Option(help="Name of the run's folder; script and time by default.")]
Runs = Annotated[Path, Option(help="Where run folders lie.")]
Linger = Annotated[float, Option(help="Seconds the shards stay up after the last worker.")]
AsJson = Annotated[bool, Option("--json", help="Print the result as JSON.")]

CHANGEABLE = frozenset({"round_timeout", "lease", "linger", "restarts", "restart_delay"})
"""What a run may be given anew by --resume; everything else would make it another run."""

OF_THE_LAUNCH = frozenset({"resume", "runs", "as_json"})
"""What says nothing of the run itself."""
