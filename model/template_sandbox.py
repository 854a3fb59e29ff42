"""The sandbox of chat templates: Jinja with no way out, and with a bound on work and size.

Jinja's own sandbox bounds attributes, not time or memory, so a template that comes with a checkpoint could run forever.
Here whatever can repeat, copy or grow is paid for from a budget before it happens. The count depends on the template
and its input alone (no clock, no trace hook), so it acts the same on every machine and in every thread.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sized
from datetime import datetime
from functools import wraps
from types import CodeType
from typing import Any, NoReturn

from jinja2 import Template, TemplateError, Undefined, nodes, pass_context
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, LoopControlExtension
from jinja2.parser import Parser
from jinja2.runtime import Context, LoopContext, Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

MAX_SOURCE = 65_536  # characters; the largest templates in use have about 20,000
CHARACTERS_A_UNIT = 16
NODES_A_UNIT = 8
LARGEST_INTEGER_BITS = 64  # keeps products, powers and hash collisions small
LARGEST_ARGUMENT = 100  # for the numbers that filters take: precisions, indents

STR_METHODS = frozenset(
    "capitalize count endswith find index isalnum isalpha isascii isdecimal isdigit islower isnumeric isspace isupper "
    "join lower lstrip partition removeprefix removesuffix replace rfind rindex rpartition rsplit rstrip split "
    "splitlines startswith strip title upper".split()
)
DICT_METHODS = frozenset({"get", "items", "keys", "values"})
LIST_METHODS = frozenset({"count", "index"})
FREE_FILTERS = frozenset({"count", "d", "default", "first", "items", "last", "length", "safe"})
SHALLOW_FILTERS = frozenset({"list", "map", "reject", "rejectattr", "reverse", "select", "selectattr"})
DEEP_FILTERS = frozenset(
    "abs capitalize dictsort e escape float int join lower max min replace round sort string sum title trim unique "
    "upper".split()
)
FREE_TESTS = frozenset(
    "boolean callable defined false float integer iterable mapping none number sameas sequence string true "
    "undefined".split()
)
DEEP_TESTS = frozenset(
    "!= < <= == > >= divisibleby eq equalto even ge greaterthan gt in le lessthan lower lt ne odd upper".split()
)
SEQUENCES: tuple[type[Collection[Any]], ...] = (
    list, tuple, range, type({}.keys()), type({}.values()), type({}.items())
)  # fmt: skip

Function = Callable[..., Any]


class Budget:
    """What a rendering may still spend: about one unit a step, an item of a list, or 16 characters."""

    def __init__(self, units: int) -> None:
        self.left = units

    def spend(self, units: int = 1) -> bool:
        """Pay, or end the rendering with a `SecurityError`."""
        self.left -= units
        if self.left < 0:
            raise SecurityError("it does more work, or makes more text, than a chat template may")
        return True

    def characters(self, count: int) -> None:
        """Pay for that many characters."""
        self.spend(1 + count // CHARACTERS_A_UNIT)

    def weigh(self, *values: Any) -> None:
        """Pay for all that is inside the values: what it costs at most to compare, hash or print them."""
        stack = list(values)
        while stack:
            value = stack.pop()
            if isinstance(value, str):
                self.characters(len(value))
            elif isinstance(value, SEQUENCES):
                self.spend(1 + len(value))
                stack.extend(value)
            elif isinstance(value, dict):
                self.spend(1 + 2 * len(value))
                stack.extend(value)
                stack.extend(value.values())
            elif value is None or isinstance(value, int | float | Undefined):
                self.spend()
                check_integer(value)
            else:
                raise SecurityError(f"it uses a {type(value).__name__} as a value")

    def settle(self, result: Any) -> Any:
        """Pay for a result of a call or filter; an iterator becomes the list of its items."""
        if isinstance(result, str):
            self.characters(len(result))
        elif isinstance(result, list | tuple | dict):
            self.spend(len(result))
        elif isinstance(result, Iterator):
            return [item for item in result if self.spend()]
        else:
            check_integer(result)
        return result

    def concat(self, pieces: Iterable[str]) -> str:
        """Join output, paying before each piece is kept."""
        kept = []
        for piece in pieces:
            self.characters(len(piece))
            kept.append(piece)
        return "".join(kept)

    def tilde(self, values: tuple[Any, ...]) -> str:
        """The operator `~`."""
        self.weigh(*values)
        return "".join(map(str, values))

    def weighed(self, value: Any) -> Any:
        """The value itself, paid for."""
        self.weigh(value)
        return value


def check_integer(value: Any) -> None:
    """Refuse integers too large to be meant."""
    if isinstance(value, int) and value.bit_length() > LARGEST_INTEGER_BITS:
        raise SecurityError(f"it makes an integer of more than {LARGEST_INTEGER_BITS} bits")


class Metering(NodeTransformer):
    """Puts the payments into the syntax tree, at each place that the environment's own hooks do not see.

    The names of the filters it calls begin with `#`, so a template cannot spell them.
    """

    def _filter(self, name: str, node: nodes.Expr) -> nodes.Filter:
        return nodes.Filter(node, name, [], [], None, None, lineno=node.lineno)

    def _payment(self, node: nodes.Node, counted: nodes.Node) -> nodes.Filter:
        units = 1 + sum(1 for _ in counted.find_all(nodes.Node)) // NODES_A_UNIT
        return self._filter("#spend", nodes.Const(units, lineno=node.lineno))

    def _body(self, node: Any) -> Any:
        payment = self._payment(node, node)
        self.generic_visit(node)
        node.body.insert(0, nodes.ExprStmt(payment, lineno=node.lineno))
        return node

    visit_Macro = visit_CallBlock = visit_Block = _body

    def visit_For(self, node: nodes.For) -> nodes.Node:
        if node.test is not None:
            node.test = nodes.And(self._payment(node, node.test), node.test, lineno=node.lineno)
        self._body(node)
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        return self._filter("#tilde", nodes.Tuple(node.nodes, "load", lineno=node.lineno))

    def visit_Compare(self, node: nodes.Compare) -> nodes.Node:
        self.generic_visit(node)
        node.expr = self._filter("#weighed", node.expr)
        for operand in node.ops:
            operand.expr = self._filter("#weighed", operand.expr)
        return node

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Node:
        self.generic_visit(node)
        return self._filter("#settle", node) if isinstance(node.arg, nodes.Slice) else node

    def visit_Pair(self, node: nodes.Pair) -> nodes.Node:
        self.generic_visit(node)
        node.key = self._filter("#weighed", node.key)
        return node

    def visit_Const(self, node: nodes.Const) -> nodes.Node:
        check_integer(node.value)
        return node


class GenerationBlock(Extension):
    """`{% generation %}` marks what training learns from; for rendering it is its content."""

    tags = {"generation"}  # noqa: RUF012  (jinja2 declares it so)

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)


def raise_exception(message: object) -> NoReturn:
    """What a template calls to refuse messages."""
    raise TemplateError(str(message)[:300])


def strftime_now(pattern: str) -> str:
    """Today, as templates print it."""
    if len(pattern) > LARGEST_ARGUMENT:
        raise SecurityError("its date format is too long")
    return datetime.now().strftime(pattern)


@pass_context
def weigh_output(context: Context, value: Any) -> Any:
    """Jinja's hook before a value is printed."""
    environment = context.environment
    assert isinstance(environment, BoundedEnvironment)
    return environment.budget.weighed(value)


class BoundedEnvironment(ImmutableSandboxedEnvironment):
    """One rendering's environment: an allow-list of names, each paid for from the budget."""

    intercepted_binops = frozenset({"+", "-", "*", "/", "//", "%", "**"})

    def __init__(self, budget: Budget) -> None:
        super().__init__(
            trim_blocks=True, lstrip_blocks=True, optimized=False, finalize=weigh_output,
            extensions=[LoopControlExtension, GenerationBlock],
        )  # fmt: skip
        self.budget = budget
        self.concat = budget.concat  # type: ignore[method-assign]
        allowed = FREE_FILTERS | SHALLOW_FILTERS | DEEP_FILTERS
        self.filters = {name: self._bounded_filter(name, self.filters[name]) for name in allowed}
        self.filters["tojson"] = self._tojson
        self.filters |= {
            "#spend": budget.spend, "#tilde": budget.tilde, "#weighed": budget.weighed, "#settle": budget.settle
        }  # fmt: skip
        tests: dict[str, Any] = {**self.tests}
        self.tests = {name: tests[name] for name in FREE_TESTS}
        self.tests |= {name: self._bounded_test(tests[name]) for name in DEEP_TESTS}
        self.globals = {
            "range": self.globals["range"], "dict": dict, "namespace": Namespace,
            "raise_exception": raise_exception, "strftime_now": strftime_now,
        }  # fmt: skip

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        """An allow-list, where Jinja has a list of exceptions."""
        for kind, names in ((str, STR_METHODS), (dict, DICT_METHODS), (list | tuple, LIST_METHODS)):
            if isinstance(obj, kind):
                return attr in names
        return isinstance(obj, Namespace | LoopContext) and not attr.startswith("_")

    def wrap_str_format(self, value: Any) -> None:
        """`str.format` is refused, as every method that is not listed: widths make it unbounded."""
        return None

    def getitem(self, obj: Any, argument: Any) -> Any:
        if not isinstance(argument, str | int):
            self.budget.weigh(argument)  # hashing nested tuples can take exponential time
        return super().getitem(obj, argument)

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        budget = __self.budget
        budget.spend(1 + len(args) + len(kwargs))
        if not isinstance(__obj, Macro | LoopContext):  # these only pass their arguments on
            budget.weigh(*args, *kwargs.values())
            owner = getattr(__obj, "__self__", None)
            if isinstance(owner, str):
                __self._before_str_method(owner, __obj.__name__, args)
            elif isinstance(owner, list | tuple):
                budget.weigh(owner)
        return budget.settle(super().call(__context, __obj, *args, **kwargs))

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        check_integer(left)
        check_integer(right)
        if operator == "+" and isinstance(left, Sized) and isinstance(right, Sized):
            self._pay_copies(left, 1)
            self._pay_copies(right, 1)
        elif operator == "*":
            for value, times in ((left, right), (right, left)):
                if isinstance(value, Sized) and isinstance(times, int):
                    self._pay_copies(value, times)
        elif operator == "%" and isinstance(left, str):
            raise SecurityError("it formats text with %")
        elif operator == "**" and not (isinstance(right, int | float) and abs(right) <= LARGEST_ARGUMENT):
            raise SecurityError("its exponent is too large")
        return self.budget.settle(super().call_binop(context, operator, left, right))

    def _pay_copies(self, value: Sized, times: int) -> None:
        size = len(value) * max(times, 0)
        if isinstance(value, str):
            self.budget.characters(size)
        else:
            self.budget.spend(1 + size)

    def _before_str_method(self, text: str, name: str, args: tuple[Any, ...]) -> None:
        self.budget.characters(len(text))
        first = args[0] if args and isinstance(args[0], str) else ""
        if name in ("split", "rsplit", "splitlines"):
            self.budget.spend(text.count(first) if first else 1 + len(text) // 2)
        elif name == "replace":
            self._before_replace(text, args)
        elif name == "join" and args and isinstance(args[0], Sized):
            self.budget.characters(len(text) * len(args[0]))
        elif name.endswith("strip"):
            self.budget.characters(len(text) * len(first))

    def _before_replace(self, text: Any, args: tuple[Any, ...]) -> None:
        if len(args) < 2 or not all(isinstance(value, str) for value in (text, *args[:2])):
            raise SecurityError("replace takes text, and arguments by position")
        self.budget.characters(text.count(args[0]) * len(args[1]))

    def _bounded_filter(self, name: str, function: Function) -> Function:
        skipped = 1 if hasattr(function, "jinja_pass_arg") else 0

        @wraps(function)
        def bounded(*args: Any, **kwargs: Any) -> Any:
            self.budget.spend()
            if name not in FREE_FILTERS:
                self._before_filter(name, args[skipped], args[skipped + 1 :], kwargs)
            return self.budget.settle(function(*args, **kwargs))

        return bounded

    def _before_filter(self, name: str, value: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        given = (*args, *kwargs.values())
        if any(isinstance(arg, int) and abs(arg) > LARGEST_ARGUMENT for arg in given):
            raise SecurityError(f"it gives the filter {name} too large a number")
        self.budget.weigh(*given)
        if name in SHALLOW_FILTERS:
            self.budget.spend(len(value) if isinstance(value, Sized) else 1)
        else:
            self.budget.weigh(value)
        if name == "replace":
            self._before_replace(value, args)
        elif name == "join" and isinstance(value, Sized):
            self.budget.characters(len(value) * len(str(args[0] if args else kwargs.get("d", ""))))
        elif name == "trim" and given:
            self.budget.characters(len(str(value)) * len(str(given[0])))
        elif name == "sum" and any(isinstance(arg, Sized) and not isinstance(arg, str) for arg in given):
            raise SecurityError("it sums lists")

    def _bounded_test(self, function: Function) -> Function:
        @wraps(function)
        def bounded(*args: Any, **kwargs: Any) -> Any:
            self.budget.weigh(*args, *kwargs.values())
            return function(*args, **kwargs)

        return bounded

    def _tojson(
        self, value: Any, ensure_ascii: bool = False, indent: int | None = None,
        separators: tuple[str, str] | None = None, sort_keys: bool = False,
    ) -> str:  # fmt: skip
        """JSON without the escapes for HTML that Jinja's own filter adds, as transformers has it."""
        if indent is not None and not (isinstance(indent, int) and 0 <= indent <= LARGEST_ARGUMENT):
            raise SecurityError("it gives the filter tojson too large an indent")
        self.budget.weigh(value, separators)
        encoder = json.JSONEncoder(ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
        return self.budget.concat(encoder.iterencode(value))


def compile_template(source: str) -> CodeType:
    """Parse and compile a template; any exception means that it cannot be used."""
    if len(source) > MAX_SOURCE:
        raise SecurityError(f"it is longer than {MAX_SOURCE} characters")
    environment = BoundedEnvironment(Budget(0))
    tree = Metering().visit(environment.parse(source))
    tree.set_environment(environment)
    return environment.compile(tree)


def run_template(code: CodeType, variables: Mapping[str, Any], units: int) -> str:
    """Render compiled code with `units` to spend; any exception means that the template failed or was cut off."""
    environment = BoundedEnvironment(Budget(units))
    template = Template.from_code(environment, code, environment.make_globals(None))
    return template.render(variables)
