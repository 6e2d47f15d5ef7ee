"""What a PromQL expression asks for, by a parser that has read it."""

from dataclasses import dataclass, field

import promql_parser as promql


@dataclass
class Asked:
    """matchers: (metric, label, its values, "" = any) of all selectors; labels: those that it groups and joins by."""

    metrics: set[str] = field(default_factory=set)
    matchers: set[tuple[str, str, str]] = field(default_factory=set)
    labels: set[str] = field(default_factory=set)


def asked(expr):
    found = Asked()
    _walk(promql.parse(expr), found)
    return found


def _walk(node, found):
    if isinstance(node, promql.VectorSelector):
        found.metrics.add(node.name)
        assert not node.matchers.or_matchers
        for one in node.matchers.matchers:
            found.matchers.add((node.name, one.name, one.value))
    elif isinstance(node, promql.MatrixSelector):
        _walk(node.vector_selector, found)
    elif isinstance(node, promql.Call):
        for argument in node.args:
            _walk(argument, found)
    elif isinstance(node, promql.BinaryExpr):
        if node.modifier is not None:
            matching = node.modifier.matching
            found.labels |= set(matching.labels if matching else ()) | set(node.modifier.group_labels or ())
        _walk(node.lhs, found)
        _walk(node.rhs, found)
    elif isinstance(node, promql.AggregateExpr):
        found.labels |= set(node.modifier.labels if node.modifier else ())
        _walk(node.expr, found)
    elif isinstance(node, promql.ParenExpr | promql.UnaryExpr | promql.SubqueryExpr):
        _walk(node.expr, found)
    else:
        assert isinstance(node, promql.NumberLiteral | promql.StringLiteral), type(node)
