"""python -m experiments.figures   # draws experiments/figures/mask.svg: jepa.mask on a toy row, a line for each token,
a cell for each that it may attend to, in the colour of that one's segment; the picture of the main README."""

from experiments.sweep import ROOT
from jepa import ANSWER, CODE, PRED, TEXT, mask, toy_row
from support import cli

MASK = ROOT / "experiments" / "figures" / "mask.svg"
SEGMENTS = {  # number: (name, colour, what the row of the picture says of it)
    TEXT: ("TEXT", "#0072B2", "the question"),
    ANSWER: ("ANSWER", "#009E73", "goes on from TEXT: learns the answer and to stop"),
    PRED: ("PRED", "#D55E00", "goes on from TEXT too: its last state predicts Enc(Code)"),
    CODE: ("CODE", "#CC79A7", "the answer alone: its last state is Enc(Code)"),
}
SIDE, LEFT, TOP, WIDTH = 26, 182, 136, 980  # of a cell; of the first cell; of the picture


def mask_svg():
    """The picture as SVG: a row for each token, a filled cell where it may attend to the token of the column."""
    tokens, batch = toy_row()
    allowed, segment, position = mask(batch.segment)[0].tolist(), batch.segment[0].tolist(), batch.position[0].tolist()
    targets = {column + 1 for _, column in batch.label_at.tolist()}
    ends = {batch.text_at[0, 1].item(), batch.code_at[0, 1].item()}
    height, parts = TOP + SIDE * len(tokens) + 62, []

    def text(x, y, words, size=13, fill="#1a1a1a", more=""):
        words = words.replace("&", "&amp;").replace("<", "&lt;")
        parts.append(f'<text x="{x}" y="{y}" font-size="{size}" fill="{fill}" {more}>{words}</text>')

    def box(x, y, width, tall, fill, more=""):
        parts.append(f'<rect x="{x}" y="{y}" width="{width}" height="{tall}" fill="{fill}" {more}/>')

    box(0.5, 0.5, WIDTH - 1, height - 1, "#ffffff", 'rx="10" stroke="#d0d7de"')
    for q, token in enumerate(tokens):
        name, colour, _ = SEGMENTS[segment[q]]
        x, y, bold = LEFT + SIDE * q, TOP + SIDE * q, 'font-weight="bold" ' * (q in targets)
        text(LEFT - 44, y + 18, token, fill=colour, more=bold + 'text-anchor="end"')
        text(LEFT - 12, y + 18, str(position[q]), 12, "#57606a", 'text-anchor="end"')
        text(0, 0, token, fill=colour, more=bold + f'transform="translate({x + 18} {TOP - 12}) rotate(-55)"')
        for k, sees in enumerate(allowed[q]):
            fill = SEGMENTS[segment[k]][1] if sees else "#eef1f4"
            box(LEFT + SIDE * k + 1, y + 1, SIDE - 2, SIDE - 2, fill, 'rx="3"')
        if q in ends:
            parts.append(f'<circle cx="{x + SIDE / 2}" cy="{y + SIDE / 2}" r="6" fill="#ffffff"/>')
    right = LEFT + SIDE * len(tokens) + 16
    for number, (name, colour, says) in SEGMENTS.items():
        first, last = segment.index(number), len(segment) - segment[::-1].index(number)
        y, tall = TOP + SIDE * first, SIDE * (last - first)
        box(10, y + 2, 5, tall - 4, colour, 'rx="2"')
        text(22, y + tall / 2 + 5, name, fill=colour, more='font-weight="bold"')
        box(right - 8, y + 2, 4, tall - 4, colour, 'rx="2"')
        text(right + 4, y + tall / 2 + 5, says, 13)
    text(LEFT - 12, TOP - 12, "position", 12, "#57606a", 'text-anchor="end"')
    text(22, 32, "Who may attend to whom: a row of the picture is a token that asks, a column one that it sees", 15)
    text(22, height - 38, "Bold: a token that is to be written. White dots: the two states between which the JEPA loss "
         "takes 1 - cosine.", 13)
    text(22, height - 17, "Plain fine-tuning and inference are this picture without PRED and CODE.", 13)
    return "\n".join([f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" '
                      'font-family="system-ui, Segoe UI, Helvetica, Arial, sans-serif">', *parts, "</svg>", ""])


def main():
    cli.parser(__doc__).parse_args()
    cli.write(MASK, mask_svg())
    print(f"{MASK.relative_to(ROOT)} is drawn")


if __name__ == "__main__":
    cli.run(main)
