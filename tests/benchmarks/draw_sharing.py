"""Draw the idea of ShaResNet, a stage of a bottleneck ResNet beside one that shares its 3x3.

    python tests/benchmarks/draw_sharing.py

Written is hub/sharing.svg, and nothing else.
"""

from pathlib import Path

OWN = ('#4c72b0', '#dd8452', '#55a868', '#8172b3')  # one colour for each 3x3 with weights of its own
SHARED, LIGHT, DARK = '#c44e52', '#e8e8ee', '#333344'
BLOCK_W, BLOCK_H, GAP, LEFT = 150, 150, 34, 40


def text(x, y, content, size=14, anchor='middle', colour=DARK, weight='normal'):
    return (
        f'<text x="{x}" y="{y}" font-size="{size}" text-anchor="{anchor}" fill="{colour}" '
        f'font-weight="{weight}">{content}</text>'
    )


def box(x, y, w, h, label, fill, colour=DARK, dashed=False):
    dash = ' stroke-dasharray="4 3"' if dashed else ''
    return (
        f'<rect x="{x}" y="{y}" width="{w}" height="{h}" rx="4" fill="{fill}" stroke="{DARK}"{dash}/>'
        f'{text(x + w / 2, y + h / 2 + 5, label, 13, colour=colour)}'
    )


def arrow(*points, colour=DARK):
    path = ' L'.join(f'{x} {y}' for x, y in points)
    head = f'url(#head{colour[1:]})'
    return f'<path d="M{path}" stroke="{colour}" stroke-width="1.6" marker-end="{head}" fill="none"/>'


def arrow_head(colour):
    return (
        f'<marker id="head{colour[1:]}" markerWidth="8" markerHeight="8" refX="6" refY="3" orient="auto">'
        f'<path d="M0 0 L6 3 L0 6 z" fill="{colour}"/></marker>'
    )


def stage(y, title, shared):
    """Four blocks from left to right; with `shared`, one 3x3 below them that all use."""
    parts = [text(LEFT, y - 16, title, 16, 'start', weight='bold')]
    for i in range(4):
        x = LEFT + i * (BLOCK_W + GAP)
        middle = x + BLOCK_W / 2
        parts.append(
            f'<rect x="{x}" y="{y}" width="{BLOCK_W}" height="{BLOCK_H}" rx="8" fill="white" stroke="#b8b8c4"/>'
        )
        parts.append(box(middle - 40, y + 14, 80, 28, '1x1', LIGHT))
        if shared:
            parts.append(box(middle - 40, y + 61, 80, 28, '3x3', 'white', SHARED, dashed=True))
            side = middle + 58
            parts.append(arrow((side, y + BLOCK_H + 36), (side, y + 75), (middle + 42, y + 75), colour=SHARED))
        else:
            parts.append(box(middle - 40, y + 61, 80, 28, '3x3', OWN[i], 'white'))
        parts.append(box(middle - 40, y + 108, 80, 28, '1x1', LIGHT))
        parts.append(arrow((x - GAP, y + BLOCK_H / 2), (x - 2, y + BLOCK_H / 2)))
    end = LEFT + 4 * BLOCK_W + 3 * GAP
    parts.append(arrow((end, y + BLOCK_H / 2), (end + GAP, y + BLOCK_H / 2)))
    if shared:
        label = 'layer.conv: one 3x3 for all blocks of the stage'
        parts.append(box(LEFT, y + BLOCK_H + 36, end - LEFT, 32, label, SHARED, 'white'))
    return ''.join(parts)


def main():
    width, height = 2 * LEFT + 4 * BLOCK_W + 3 * GAP, 470
    svg = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" '
        f'font-family="Helvetica, Arial, sans-serif">'
        f'<defs>{arrow_head(DARK)}{arrow_head(SHARED)}</defs>'
        f'<rect width="{width}" height="{height}" fill="white"/>'
        f'{stage(40, "ResNet: every block has a 3x3 of its own", shared=False)}'
        f'{stage(246, "ShaResNet: the stage has one 3x3 and lends it to its blocks", shared=True)}'
        f'</svg>\n'
    )
    (Path(__file__).parents[2] / 'hub' / 'sharing.svg').write_text(svg, encoding='utf-8')


if __name__ == '__main__':
    main()
