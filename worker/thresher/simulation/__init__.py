"""Any method on any function, in one process: what a run does, without its servers, wire and clocks."""

from thresher.simulation.simulator import GradientOf, OptimizerOf, Placement, SimulatedRound, Simulator

__all__ = ["GradientOf", "OptimizerOf", "Placement", "SimulatedRound", "Simulator"]
