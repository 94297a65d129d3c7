#!/usr/bin/env python3
"""Print AST nodes a code line of each file, and every function over the limits; exit 1 if any is.

    python tests/density.py dnc_gpt2.py long_range.py
    python tests/density.py --kernels dnc_scan/cpu.py      of kernels, which have no limits

A code line is one that is neither blank nor comment nor docstring.
"""

import ast
import io
import sys
import tokenize
from pathlib import Path

NODES_A_LINE, LINES, NODES = 12.0, 60, 350
LAYOUT = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT,
          tokenize.ENDMARKER}


def code_lines(text: str, tree: ast.Module) -> int:
    """Count the lines of a file that hold code."""
    lines = set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in LAYOUT:
            lines.update(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(tree):
        documented = isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)
        if documented and ast.get_docstring(node) is not None:
            lines -= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    return len(lines)


def check(path: Path) -> list[str]:
    """Print a file's measures, and return what is over a limit; plots may have any size."""
    text = path.read_text(encoding="utf-8")
    tree = ast.parse(text)
    density = sum(1 for _ in ast.walk(tree)) / code_lines(text, tree)
    over = [f"{path}: {density:.1f} nodes a line"] if density > NODES_A_LINE else []
    longest = 0
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            lines, nodes = node.end_lineno - node.lineno + 1, sum(1 for _ in ast.walk(node))
            longest = max(longest, lines)
            if lines > LINES or (nodes > NODES and not node.name.startswith(("plot", "draw"))):
                over.append(f"{path}:{node.lineno} {node.name}: {lines} lines, {nodes} nodes")
    print(f"{path}: {density:.1f} nodes a line, longest function {longest} lines, "
          f"{text.count(chr(10)):,} lines, {len(text.encode()):,} bytes")
    return over


if __name__ == "__main__":
    kernels = "--kernels" in sys.argv
    paths = [Path(word) for word in sys.argv[1:] if word != "--kernels"]
    over = [line for path in paths for line in check(path)]
    print(*over, sep="\n")
    sys.exit(1 if over and not kernels else 0)
