"""What a caller tells a report beyond the runs' folders."""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Phase:
    """One part of a longer job: what it did and how long that took."""

    name: str
    seconds: float
    outcome: str
    earlier: bool = False  # done by an earlier call, whose seconds these are


@dataclass
class Story:
    title: str = "voxtrast report"
    commands: list[str] = field(default_factory=list)
    phases: list[Phase] = field(default_factory=list)
    caveats: list[str] = field(default_factory=list)  # the first one also stands at the top
    class_names: dict[int, str] = field(default_factory=dict)  # by label value
    exports: list[str] = field(default_factory=list)

    def class_name(self, value: int | str) -> str:
        return self.class_names.get(int(value), f"class {value}")
