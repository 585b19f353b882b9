"""Templates in campaign files: Jinja2's sandbox without loops, calls, attribute access or unbounded results."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache, wraps
from typing import Any

from jinja2 import StrictUndefined, TemplateError, TemplateSyntaxError, UndefinedError, meta, nodes
from jinja2.sandbox import ImmutableSandboxedEnvironment

from sdpipeline.campaigns.yaml_source import control_character

LONGEST_TEMPLATE = 20_000
LONGEST_RESULT = 20_000
MAX_EXPRESSIONS = 400
LONGEST_FILTERED = 100_000
"""Maximum characters of a filter's input: a table's longest cell."""
DEEPEST = 50

FILTERS = frozenset(
    {"upper", "lower", "title", "capitalize", "trim", "replace", "default", "round", "int", "float", "abs", "string"}
)
_ALLOWED = (
    nodes.Template,
    nodes.Output,
    nodes.TemplateData,
    nodes.Name,
    nodes.Const,
    nodes.Filter,
    nodes.If,
    nodes.CondExpr,
    nodes.Compare,
    nodes.Operand,
    nodes.And,
    nodes.Or,
    nodes.Not,
    nodes.Neg,
    nodes.Concat,
    nodes.Add,
    nodes.Sub,
)
_WORDS = {
    "Getattr": "reaching into a value with a dot",
    "Getitem": "reaching into a value with brackets",
    "Call": "calling something",
    "For": "a loop",
    "Test": "a test with `is`",
    "Keyword": "naming an argument",
}


class TemplateRefusedError(ValueError):
    """A template is not allowed, or cannot be rendered with the given variables."""


def _replace(value: Any, was: Any, becomes: Any) -> str:
    """Replace text as Jinja2's own filter does, but with a bound on the growth by chained calls."""
    text, old, new = str(value), str(was), str(becomes)
    if len(text) + text.count(old) * max(0, len(new) - len(old)) > LONGEST_RESULT:
        raise TemplateRefusedError(f"becomes longer than {LONGEST_RESULT:,} characters")
    return text.replace(old, new)


def _round(value: Any, precision: Any = 0, method: Any = "common") -> float:
    """Round as Jinja2's own filter does, for precisions of a float; others would compute huge powers of ten."""
    if precision not in range(16) or method != "common":
        raise TemplateRefusedError("round takes a precision from 0 to 15 and nothing else")
    return round(float(value), int(precision))


def _bounded(work: Callable[..., Any]) -> Callable[..., Any]:
    """Limit a filter to values of one cell's length: longer, joined ones would cost seconds and gigabytes."""

    @wraps(work)
    def bounded(value: Any, *arguments: Any) -> Any:
        if isinstance(value, str) and len(value) > LONGEST_FILTERED:
            raise TemplateRefusedError(f"filters a text longer than {LONGEST_FILTERED:,} characters")
        return work(value, *arguments)

    return bounded


def _sandbox() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        undefined=StrictUndefined, autoescape=False, keep_trailing_newline=True, optimized=False
    )
    # `range`, `dict` and other globals are not variables of a campaign.
    environment.globals.clear()
    filters = {name: environment.filters[name] for name in FILTERS} | {"replace": _replace, "round": _round}
    environment.filters = {name: _bounded(work) for name, work in filters.items()}
    return environment


_environment = _sandbox()


@dataclass(frozen=True, slots=True, kw_only=True)
class Template:
    """A compiled template: its text, the names it uses, and its render function."""

    text: str
    names: frozenset[str]
    _value: Callable[[Mapping[str, Any]], Any]

    def render(self, variables: Mapping[str, Any]) -> Any:
        """Render the value; a template of a single variable keeps the variable's type.

        Raises TemplateRefusedError.
        """
        try:
            value = self._value(variables)
        except KeyError as error:
            raise TemplateRefusedError(f"the variable {error.args[0]!r} is not declared") from error
        except UndefinedError as error:
            raise TemplateRefusedError(str(error)) from error
        except TemplateRefusedError:
            raise
        except (TemplateError, TypeError, ValueError, ArithmeticError) as error:
            raise TemplateRefusedError(f"cannot be filled in: {error}") from error
        if isinstance(value, str) and len(value) > LONGEST_RESULT:
            raise TemplateRefusedError(f"becomes longer than {LONGEST_RESULT:,} characters")
        return value


@lru_cache(maxsize=4096)
def compile_template(text: str) -> Template:
    """Check and compile a template; raises TemplateRefusedError that names the forbidden part."""
    if len(text) > LONGEST_TEMPLATE:
        raise TemplateRefusedError(f"is longer than {LONGEST_TEMPLATE:,} characters")
    if text.count("{{") > MAX_EXPRESSIONS:
        raise TemplateRefusedError(f"holds more than {MAX_EXPRESSIONS} expressions")
    if "{" not in text:
        return Template(text=text, names=frozenset(), _value=lambda _: text)
    try:
        tree = _environment.parse(text)
        _check(tree, depth=0)
        _check_uses(tree)
        names = frozenset(meta.find_undeclared_variables(tree))
        return Template(text=text, names=names, _value=_joined(tree) or _rendered(text))
    except TemplateSyntaxError as error:
        unclosed = "end of template" in str(error.message)
        why = "a {{ or {% has no end" if unclosed else error.message
        raise TemplateRefusedError(f"is not a template: {why}") from error
    except TemplateRefusedError:
        raise
    except (RecursionError, ValueError) as error:
        raise TemplateRefusedError("is not a template: nested too deeply, or a number too long") from error


def _check(tree: nodes.Node, *, depth: int) -> None:
    if depth > DEEPEST:
        raise TemplateRefusedError("is nested too deeply")
    for node in tree.iter_child_nodes():
        if not isinstance(node, _ALLOWED):
            name = type(node).__name__
            raise TemplateRefusedError(f"{_WORDS.get(name, f'`{name.lower()}`')} is not allowed in a template")
        if isinstance(node, nodes.Filter) and node.name not in FILTERS:
            raise TemplateRefusedError(f"the filter {node.name!r} is not known; there are {', '.join(sorted(FILTERS))}")
        if isinstance(node, nodes.Name) and node.name in ("self", "super"):
            raise TemplateRefusedError(f"{node.name!r} is a reserved word of Jinja, not a variable")
        if isinstance(node, nodes.Const) and (character := control_character(str(node.value))):
            raise TemplateRefusedError(f"holds the character {character}")
        _check(node, depth=depth + 1)


def _check_uses(tree: nodes.Template) -> None:
    """Limit the uses of variables, as each may insert a table's longest cell."""
    if sum(1 for _ in tree.find_all(nodes.Name)) > MAX_EXPRESSIONS:
        raise TemplateRefusedError(f"uses variables more than {MAX_EXPRESSIONS} times")


def _joined(tree: nodes.Template) -> Callable[[Mapping[str, Any]], Any] | None:
    """Render templates of only text and bare variables (most of them) here, in a fifth of Jinja2's time."""
    parts = [part for output in tree.body if isinstance(output, nodes.Output) for part in output.nodes]
    if any(not isinstance(part, nodes.Output) for part in tree.body):
        return None
    if any(not isinstance(part, nodes.TemplateData | nodes.Name) for part in parts):
        return None
    if len(parts) == 1 and isinstance(only := parts[0], nodes.Name):
        return lambda variables: variables[only.name]
    texts = [part.data if isinstance(part, nodes.TemplateData) else None for part in parts]
    names = [part.name if isinstance(part, nodes.Name) else "" for part in parts]
    pairs = list(zip(texts, names, strict=True))
    return lambda variables: "".join(
        [str(variables[name]) if text is None else text for text, name in pairs]  # a list joins faster
    )


def _rendered(text: str) -> Callable[[Mapping[str, Any]], Any]:
    compiled = _environment.from_string(text)
    return lambda variables: str(compiled.render(variables))
