#!/usr/bin/env python3
"""Runs the demo, and draws what a terminal shows of it as an animated SVG.

usage: demo-svg.py [RECORDING] >demo.svg

A RECORDING is drawn instead of a run: lines of seconds, a space, and a line of output.
Pauses are shortened.
"""
import html
import os
import re
import subprocess
import sys
import time

COLUMNS, ROWS = 120, 32
LINE, CHAR, MARGIN = 17, 7.83, 12  # pixels
SHORTEST, LONGEST = 0.08, 1.2  # seconds between two lines
END = 6  # seconds, to read the last lines

STYLE = """
svg{--back:#fff;--text:#24292f;--command:#0550ae;--edge:#d0d7de}
@media(prefers-color-scheme:dark){svg{--back:#0d1117;--text:#e6edf3;--command:#79c0ff;--edge:#30363d}}
rect{fill:var(--back)}.edge{stroke:var(--edge)}.c{fill:var(--command)}.h{font-weight:bold}
text{fill:var(--text);font:13px ui-monospace,Menlo,Consolas,"DejaVu Sans Mono",monospace;white-space:pre}
"""


def record():
    """Yields each line of the demo and when it came."""
    demo = os.path.join(os.path.dirname(os.path.abspath(__file__)), "demo.sh")
    yield time.time(), "$ make demo"
    run = subprocess.Popen([demo], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    for line in run.stdout:
        sys.stderr.write(line)
        yield time.time(), line
    if run.wait() != 0:
        sys.exit("the demo failed")


def read(name):
    """Yields the lines of a recording."""
    with open(name) as recording:
        for line in recording:
            seconds, text = line.split(" ", 1)
            yield float(seconds), text


def rows(lines):
    """Yields (seconds, class, text) of each row of the terminal."""
    now, before = 0, None
    for at, text in lines:
        if before is not None:
            now += min(max(at - before, SHORTEST), LONGEST)
        before = at
        kind = "h" if text.startswith("\033[1m") else "c" if text.startswith("$ ") else ""
        text = re.sub(r"\033\[[0-9;]*m", "", text.rstrip("\n"))
        for start in range(0, max(len(text), 1), COLUMNS):
            yield now, kind, text[start : start + COLUMNS]


def animation(name, shown, end, offset):
    """Returns the style that moves an element with each row, by offset(rows) pixels."""
    frames = {}
    for n, (at, _, _) in enumerate(shown, 1):
        frames[f"{100 * at / end:.2f}%"] = offset(n)  # the last of those that come together
    css, last = "", None
    for percent, y in frames.items():
        if y != last:
            css += f"{percent}{{transform:translateY({y}px)}}"
        last = y
    return (f"#{name}{{transform:translateY({last}px);animation:{name} {end:.1f}s step-end infinite}}\n"
            f"@keyframes {name}{{{css}}}\n")


def main():
    shown = list(rows(read(sys.argv[1]) if len(sys.argv) > 1 else record()))
    end = shown[-1][0] + END
    width, height = int(COLUMNS * CHAR) + 2 * MARGIN, ROWS * LINE + 2 * MARGIN
    print(f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}"'
          ' role="img" aria-label="make demo in a terminal">')
    print("<style>" + STYLE + animation("scroll", shown, end, lambda n: -max(n - ROWS, 0) * LINE) +
          animation("cover", shown, end, lambda n: n * LINE) +
          "@media(prefers-reduced-motion){#scroll,#cover{animation:none}}</style>")
    print(f'<rect class="edge" x=".5" y=".5" width="{width - 1}" height="{height - 1}" rx="8"/>')
    print(f'<svg x="{MARGIN}" y="{MARGIN}" width="{width - 2 * MARGIN}" height="{ROWS * LINE}" xml:space="preserve"><g id="scroll">')
    for n, (_, kind, text) in enumerate(shown):
        if text:
            css = f' class="{kind}"' if kind else ""
            print(f'<text{css} y="{n * LINE + 13}">{html.escape(text, quote=False)}</text>')
    print(f'<rect id="cover" width="{width}" height="{(len(shown) + ROWS) * LINE}"/></g></svg></svg>')


main()
