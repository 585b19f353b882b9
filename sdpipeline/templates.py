"""Templates in campaign files: Jinja2's sandbox, narrowed to expressions that cannot loop, call or reach out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from jinja2 import StrictUndefined, TemplateError, TemplateSyntaxError, UndefinedError, meta, nodes
from jinja2.sandbox import ImmutableSandboxedEnvironment

LONGEST_TEMPLATE = 20_000
LONGEST_RESULT = 20_000

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
    nodes.Concat,
    nodes.Add,
    nodes.Sub,
)

_environment = ImmutableSandboxedEnvironment(undefined=StrictUndefined, autoescape=False, keep_trailing_newline=True)


class TemplateRefusedError(ValueError):
    """A template is refused, or has no value for the given variables."""


@dataclass(frozen=True, slots=True)
class Template:
    """A compiled template. ``sole`` is set when it is one bare variable, whose type is then kept."""

    text: str
    names: frozenset[str]
    sole: str | None
    _compiled: Any

    def render(self, variables: Mapping[str, Any]) -> Any:
        """The value for these variables; raises TemplateRefusedError."""
        if self.sole is not None and self.sole in variables:
            return variables[self.sole]
        if not self.names:
            return self.text if self._compiled is None else self._render({})
        return self._render(variables)

    def _render(self, variables: Mapping[str, Any]) -> str:
        try:
            result = str(self._compiled.render(variables))
        except UndefinedError as error:
            raise TemplateRefusedError(str(error)) from error
        except (TemplateError, TypeError, ValueError, ArithmeticError) as error:
            raise TemplateRefusedError(f"cannot be filled in: {error}") from error
        if len(result) > LONGEST_RESULT:
            raise TemplateRefusedError(f"becomes longer than {LONGEST_RESULT} characters")
        return result


@lru_cache(maxsize=4096)
def compile_template(text: str) -> Template:
    """Check and compile; raises TemplateRefusedError naming what is not allowed."""
    if "{" not in text:
        return Template(text, frozenset(), None, None)
    if len(text) > LONGEST_TEMPLATE:
        raise TemplateRefusedError(f"is longer than {LONGEST_TEMPLATE} characters")
    try:
        tree = _environment.parse(text)
    except (TemplateSyntaxError, RecursionError) as error:
        raise TemplateRefusedError(f"is not a template: {error}") from error
    _check(tree)
    names = frozenset(meta.find_undeclared_variables(tree))
    return Template(text, names, _sole_name(tree), _environment.from_string(text))


def _check(tree: nodes.Node) -> None:
    for node in tree.iter_child_nodes():
        if not isinstance(node, _ALLOWED):
            raise TemplateRefusedError(f"{type(node).__name__.lower()} is not allowed in a template")
        if isinstance(node, nodes.Filter) and node.name not in FILTERS:
            raise TemplateRefusedError(f"the filter {node.name!r} is not known; there are {', '.join(sorted(FILTERS))}")
        _check(node)


def _sole_name(tree: nodes.Template) -> str | None:
    match tree.body:
        case [nodes.Output(nodes=[nodes.Name(name=name)])]:
            return str(name)
    return None
