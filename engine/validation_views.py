"""The views that validation looks at, for those who come after training."""

from collections.abc import Sequence

from .data.pipeline import ViewPipeline
from .data.sampling import of_validation
from .data.store import Case
from .runs import LoadedRun


def validation_views(run: LoadedRun, cases: Sequence[Case]) -> ViewPipeline:
    """A run's validation views of the cases given, step by step."""
    config = run.config
    return ViewPipeline(
        run.store,
        cases,
        run.method.views,
        seed=config.seed,
        split="validation",
        global_batch=config.train.global_batch,
        threads=1,
        sampling=of_validation(config.sampling),
        on_error=config.loader.on_error,
    )
