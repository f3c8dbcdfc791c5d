"""Read a YAML file of settings; repeated keys and aliases that expand too far are errors."""

from pathlib import Path
from typing import Any

MOST_VALUES = 10_000


def read_yaml(path: Path) -> Any:
    """The plain values of a YAML file.

    Raises ValueError, in one line, for what is not valid YAML, a key that is given twice, and aliases that
    refer to themselves or expand to more than 10,000 values.
    """
    import yaml

    class Loader(yaml.SafeLoader):
        """Refuses a key that is given twice: YAML would silently take the last."""

        def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
            keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
            for number, key in enumerate(keys):
                if key in keys[:number]:
                    problem = f"the key {key!r} is given twice"
                    raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark)
            return super().construct_mapping(node, deep)

    try:
        values = yaml.load(path.read_text(encoding="utf-8"), Loader)
    except (yaml.YAMLError, UnicodeDecodeError, ValueError, OverflowError) as error:
        raise ValueError(f"{path} is not valid YAML ({_problem(error)}); correct the file") from error
    except RecursionError as error:
        raise ValueError(f"{path} is nested too deeply for a configuration; correct the file") from error
    _check_size(values, path)
    return values


def _problem(error: Exception) -> str:
    mark = getattr(error, "problem_mark", None)
    problem = getattr(error, "problem", None) or str(error).strip().partition("\n")[0]
    return f"line {mark.line + 1}: {problem}" if mark else problem


def _check_size(values: Any, path: Path) -> None:
    """Raise ValueError for more values than a configuration has, aliases counted with all they hold."""
    waiting, count = [values], 0
    while waiting:
        value = waiting.pop()
        count += 1
        if count > MOST_VALUES:
            raise ValueError(
                f"{path} holds more than {MOST_VALUES:,} values, or aliases that refer to themselves: write "
                "a shorter file"
            )
        if isinstance(value, dict):
            waiting += [*value.keys(), *value.values()]
        elif isinstance(value, list | tuple | set):
            waiting += value
