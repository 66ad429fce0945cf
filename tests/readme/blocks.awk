# Writes the ```cpp blocks of a Markdown file as OUT/program_LINE.cpp or OUT/fragment_LINE.cpp, LINE being where the block begins.
# In a fragment, #include lines, namespace aliases, structs and templates go to namespace scope; the rest becomes a function's body.
# A fragment sees prelude.hpp, and all that earlier fragments of the file defined at namespace scope.
function count(text, what) { return gsub(what, "", text) }
function finish() {
  if (program) {
    file = out "/program_" first ".cpp"
    printf "#line %d \"README.md\"\n%s", first + 1, all > file
  } else {
    file = out "/fragment_" first ".cpp"
    printf "#include \"prelude.hpp\"\n%s%s\nvoid fragment_%d();\nvoid fragment_%d() {\n%s}\n", earlier, outside, first, first, body > file
    earlier = earlier outside
  }
  close(file)
}
/^```cpp *$/ { inside = 1; first = FNR; all = body = outside = ""; program = 0; depth = 0; definition = 0; next }
/^```/ && inside { finish(); inside = 0; next }
!inside { next }
{
  all = all $0 "\n"
  if ($0 ~ /int main\(/) program = 1
  if (!definition && $0 ~ /^(struct|template|class) /) definition = 1
  if (definition) {
    outside = outside "#line " FNR " \"README.md\"\n" $0 "\n"
    code = $0
    sub(/[ \t]*\/\/.*$/, "", code)
    depth += count(code, "{") - count(code, "}")
    if (depth == 0 && code ~ /[;}]$/) definition = 0
  } else if ($0 ~ /^(#include|namespace [a-z_]+ *=|using )/) {
    outside = outside "#line " FNR " \"README.md\"\n" $0 "\n"
  } else {
    body = body "#line " FNR " \"README.md\"\n" $0 "\n"
  }
}
