"""The HTML of a report: one file, without scripts, that loads nothing."""
import base64
import html

import cv2

from errors import printable

MARK = '<meta name="generator" content="tools/report.py of MoCo">'  # only such files are replaced
STYLE = '''
:root { color-scheme: light dark; }
@media (prefers-color-scheme: dark) { .curve img { filter: invert(.9) hue-rotate(180deg); } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1rem; max-width: 78rem; font: 16px/1.5 system-ui, sans-serif;
  overflow-wrap: anywhere; }
h2 { margin: 2rem 0 .5rem; border-top: 1px solid #8886; padding-top: 1rem; }
a { color: inherit; } h2 a { text-decoration: none; } nav a { margin-right: 1.2rem; }
p { max-width: 46rem; } figure { margin: 0; } figcaption, caption, th { opacity: .8; }
.grid { display: grid; gap: 1rem 2rem;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, var(--least, 35rem)), 1fr)); }
.curve img { width: 100%; max-width: 30rem; }
.map { overflow-x: auto; margin: 1rem 0; } .map img { width: 100%; min-width: 40rem;
  max-width: 60rem; }
table { border-collapse: collapse; text-align: left; } caption, th { white-space: nowrap; }
th, td { border-bottom: 1px solid #8886; padding: .2rem 1rem .2rem 0; font-weight: normal; }
caption { text-align: left; padding: .5rem 0; }
ul { display: flex; flex-wrap: wrap; gap: .3rem; margin: 0 0 .5rem; padding: 0; list-style: none; }
li { width: 3.5rem; font-size: .75rem; text-align: center; }
li img { width: 100%; border: 3px solid transparent; border-radius: 4px; }
.query img { border-color: currentcolor; } .same img { border-color: #2da44e; }
.other img { border: 3px dashed #e5534b; } .swatch { width: auto; min-width: 3.5rem; }
.swatch img { height: 1rem; }
'''


def text(value) -> str:
    """Anything, as HTML shows it, within quotes too; a name need not be UTF-8."""
    if isinstance(value, list):
        return ', '.join(map(text, value))
    value = f'{value:.5g}' if isinstance(value, float) else str(value)
    return html.escape(printable(value).encode(errors='replace').decode())


def paragraph(words) -> str:
    return f'<p>{text(words)}</p>'


def data_uri(kind: str, content: bytes) -> str:
    return f'data:image/{kind};base64,{base64.b64encode(content).decode()}'


def jpeg(pixels) -> str:
    """uint8 BGR [height, width, 3] -> what an <img> shows."""
    return data_uri('jpeg', cv2.imencode('.jpg', pixels, [cv2.IMWRITE_JPEG_QUALITY, 80])[1])


def table(caption, rows) -> str:
    """Each row is (its heading, a value)."""
    return f'<table><caption>{text(caption)}</caption>' + '\n'.join(
        f'<tr><th scope="row">{text(name)}</th><td>{text(value)}</td></tr>'
        for name, value in rows) + '</table>'


def figure(kind, uri, words) -> str:
    """A picture of the kind curve, or map, which may be wider than the page."""
    return (f'<figure class="{kind}"{" tabindex=0" if kind == "map" else ""}><img src="{uri}" alt='
            f'"{text(words)}"><figcaption>{text(words)}</figcaption></figure>')


def images(items) -> str:
    """A row of thumbnails: of each its pixels, its name, a word below it, and its kind: query, same
    or other (class), swatch or ''."""
    return '<ul>' + '\n'.join(
        f'<li class="{kind}"><img src="{jpeg(pixels)}" alt="{text(name)}" title="{text(name)}">'
        f'{text(word)}</li>' for pixels, name, word, kind in items) + '</ul>'


def page(title, summary, sections) -> str:
    """Sections are a dict of heading -> HTML; a heading's anchor is its first word."""
    links = ' '.join(f'<a href="#{name.split()[0]}">{name}</a>' for name in sections)
    body = '\n'.join('<section><h2 id="{0}"><a href="#{0}">{1}</a></h2>\n{2}</section>'.format(
        name.split()[0], name, content) for name, content in sections.items())
    return f'''<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">{MARK}
<title>{text(title)}</title><style>{STYLE}</style></head>
<body><header><h1>{text(title)}</h1>{paragraph(summary)}
<nav aria-label="Sections">{links}</nav></header><main>
{body}
</main></body></html>
'''
