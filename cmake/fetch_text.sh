#!/usr/bin/env bash
# Fetches English text to train a small model on, from Debian packages, into .cache/ once, and prints where it is.
#   fetch_text.sh austen     the six novels of Jane Austen (r-cran-janeaustenr; the novels are in the public domain, the package MIT)
#   fetch_text.sh bible      the World English Bible (sword-text-web; public domain)
#   fetch_text.sh [english]  both in one file, 8 MB
# UTF-8. A chapter is a document, a paragraph a line, and a blank line stands between documents.
# $TINYLLAMA_TEXT names a text that is there already. Exit status 1, with a word, where it cannot be had.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
what=${1:-english}
austen=r-cran-janeaustenr bible=sword-text-web
case $what in
  austen) packages=("$austen") least=3900000 ;;
  bible) packages=("$bible") least=4000000 ;;
  english) packages=("$austen" "$bible") least=7900000 ;;
  *) echo "usage: fetch_text.sh [austen|bible|english]" >&2; exit 1 ;;
esac

if [[ -n ${TINYLLAMA_TEXT:-} ]]; then
  [[ -f $TINYLLAMA_TEXT ]] || { echo "TINYLLAMA_TEXT names no file: $TINYLLAMA_TEXT" >&2; exit 1; }
  echo "$TINYLLAMA_TEXT"
  exit 0
fi
out=$root/.cache/$what.txt
if [[ -f $out ]]; then
  echo "$out"
  exit 0
fi

for tool in apt-get dpkg-deb python3; do
  command -v "$tool" >/dev/null || { echo "needs $tool; or set TINYLLAMA_TEXT to a text of your own" >&2; exit 1; }
done
mkdir -p "$root/.cache"
work=$(mktemp -d "$root/.cache/fetch.XXXXXX")
trap 'rm -rf "$work"' EXIT
chmod 755 "$work"
echo "fetching ${packages[*]}" >&2
# `download` needs no root and installs nothing; on a machine whose package lists were never read, root can read them.
download() { (cd "$work" && apt-get download -qq -o APT::Sandbox::User=root "${packages[@]}") >>"$work/log" 2>&1; }
if ! download && ! { (( EUID == 0 )) && apt-get update -qq >>"$work/log" 2>&1 && download; }; then
  tail -n 3 "$work/log" >&2
  echo "apt-get could not fetch ${packages[*]}" >&2
  exit 1
fi
for deb in "$work"/*.deb; do dpkg-deb -x "$deb" "$work/files"; done

python3 - "$work/files" "$work/text" "$least" <<'PYTHON' || { echo "${packages[*]}: not the content that was expected" >&2; exit 1; }
import html, os, pathlib, re, struct, sys, zlib

files, out, least = pathlib.Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])

def novels(path):
    """Lines of each novel. R's lazy-load data base: a 4-byte length, then zlib; inside, after a preamble, one vector of strings."""
    data, at = path.read_bytes(), 0
    while at < len(data):
        stream = zlib.decompressobj()
        r = stream.decompress(data[at + 4:])
        at = len(data) - len(stream.unused_data)
        assert r.startswith(b"X\n\0\0\0\3"), "R's serialisation, version 3, is expected"
        i = 18 + struct.unpack_from(">I", r, 14)[0]          # past the name of the native encoding
        kind, count = struct.unpack_from(">II", r, i)
        assert kind & 255 == 16, "a vector of strings is expected"
        i, lines = i + 8, []
        for _ in range(count):
            n = struct.unpack_from(">i", r, i + 4)[0]
            lines.append(r[i + 8:i + 8 + max(n, 0)].decode("utf-8"))
            i += 8 + max(n, 0)
        yield lines

def austen(path):
    for lines in novels(path):
        chapters = [[]]
        for paragraph in re.split(r"\n\s*\n", "\n".join(lines)):
            paragraph = " ".join(paragraph.split())
            if re.fullmatch(r"(CHAPTER|Chapter) [0-9IVXLC]+\.?", paragraph):
                chapters.append([])
            elif paragraph and not re.fullmatch(r"VOLUME [IVX]+|THE END|FINIS|Finis", paragraph):
                chapters[-1].append(paragraph.replace("_", ""))   # how these files mark italics
        yield from ("\n".join(c) for c in chapters[1:] if c)

def bible(folder):
    for part in ("ot", "nt"):                                 # SWORD's zText: .bzs lists the blocks (offset, bytes), one a book; .bzz holds them
        index, data = (folder / f"{part}.bzs").read_bytes(), (folder / f"{part}.bzz").read_bytes()
        for offset, size, _ in struct.iter_unpack("<III", index):
            book = zlib.decompress(data[offset:offset + size]).decode("utf-8")
            for chapter in re.split(r"<chapter [^>]*sID=[^>]*>", book)[1:]:   # before the first: titles and introductions
                chapter = re.sub(r"(?s)<(note|title)\b[^>]*?(/>|>.*?</\1>)", " ", chapter.split("<chapter ")[0])  # the end: a glossary
                chapter = re.sub(r'<(div|lg?|lb|p)\b[^>]*>', "\n", chapter)
                chapter = re.sub(r" +([,.;:!?’”)])", r"\1", html.unescape(re.sub(r"<[^>]*>", "", chapter)))
                lines = (" ".join(line.split()) for line in chapter.split("\n"))
                text = "\n".join(line for line in lines if line)
                if text:
                    yield text

documents = []
for path in files.glob("usr/lib/R/site-library/janeaustenr/data/Rdata.rdb"):
    documents += austen(path)
for path in files.glob("usr/share/sword/modules/texts/ztext/engWEB*"):
    documents += bible(path)
text = "\n\n".join(documents) + "\n"
assert len(text) >= least, f"{least} characters are expected, {len(text)} found"
with open(out, "w", encoding="utf-8", newline="\n") as f:
    f.write(text)
PYTHON
mv "$work/text" "$out"  # the same file system: whole or not at all
echo "$out"
