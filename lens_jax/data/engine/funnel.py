"""What each step left, by source: the yield of the cleaning, for the manifest and the report page."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

import pyarrow as pa
import pyarrow.compute as pc

from lens_jax.data.engine.config import EngineConfig, Source
from lens_jax.data.engine.steps import NAMES, ORDERS, runs


@dataclass
class Funnel:
    """Images of a source by step and reason; `add` takes the decisions of a unit."""

    config: EngineConfig
    source: Source
    images: int = 0
    kept: int = 0
    # By (step, or 0 for none of the nine; reason).
    dropped: Counter[tuple[int, str]] = field(default_factory=Counter)

    def add(self, decision: pa.Table) -> None:
        """Count the rows of a table DECISION."""
        self.images += decision.num_rows
        self.kept += pc.sum(decision["kept"]).as_py() or 0
        left = decision.filter(pc.invert(decision["kept"])).group_by(["step", "reason"]).aggregate([([], "count_all")])
        for row in left.to_pylist():
            self.dropped[row["step"] or 0, row["reason"]] += row["count_all"]

    def rows(self) -> list[dict[str, object]]:
        """A row a step in the order it is counted in, and one for what passes all nine and is not kept: step, name,
        whether it ran, entered, dropped, left, and reasons by falling number. Plain JSON values."""
        thresholds, entered, found = self.config.thresholds_of(self.source), self.images, []
        for step in (*ORDERS[self.config.order], 0):
            reasons = {reason: count for (at, reason), count in self.dropped.items() if at == step}
            gone = sum(reasons.values())
            found.append(
                {
                    "step": step or None,
                    "name": NAMES.get(step, "not used"),
                    "ran": not step or runs(step, self.config, thresholds),
                    "entered": entered,
                    "dropped": gone,
                    "left": entered - gone,
                    "reasons": dict(sorted(reasons.items(), key=lambda pair: (-pair[1], pair[0]))),
                }
            )
            entered -= gone
        return found


def funnels(config: EngineConfig, decisions: Iterable[tuple[str, pa.Table]]) -> list[Funnel]:
    """One a source, in the order of the config, from (name of the source, table DECISION) of every unit."""
    found = {source.name: Funnel(config, source) for source in config.sources}
    for name, table in decisions:
        found[name].add(table)
    return list(found.values())
