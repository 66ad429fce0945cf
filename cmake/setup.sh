# Sourced by ./demo and ./test: says what happens, installs what is missing, configures a preset.

say() { printf '%s\n' "$*" >&2; }
die() { say "$*"; exit 1; }

# need WHAT...: WHAT is a Debian package, or COMMAND=PACKAGE where any provider of the command will do. Asks apt only for what is missing.
need() {
  local what missing=() apt=(env DEBIAN_FRONTEND=noninteractive apt-get) log
  for what in "$@"; do
    case $what in
      pip=*) python3 -m pip --version >/dev/null 2>&1 || missing+=("${what#*=}") ;;
      *=*) command -v "${what%%=*}" >/dev/null || missing+=("${what#*=}") ;;
      *) ! command -v dpkg-query >/dev/null || [[ $(dpkg-query -W -f='${db:Status-Status}' "$what" 2>/dev/null) == installed ]] || missing+=("$what") ;;
    esac
  done
  (( ${#missing[@]} )) || return 0
  command -v apt-get >/dev/null || die "please install what these Debian packages hold, then try again: ${missing[*]}"
  if (( EUID != 0 )); then
    command -v sudo >/dev/null || die "please install, as root: apt-get install ${missing[*]}"
    apt=(sudo "${apt[@]}")
  fi
  say "installing ${missing[*]}"
  log=$(mktemp)
  if ! { "${apt[@]}" update -qq && "${apt[@]}" install -y -qq --no-install-recommends "${missing[@]}"; } >"$log" 2>&1; then
    tail -n 30 "$log" >&2
    rm -f "$log"
    die "could not install: ${missing[*]}"
  fi
  rm -f "$log"
}

# build_jobs: how many compilers at once. Some of our units take 1-1.5 GB.
build_jobs() {
  local cores memory
  cores=$(getconf _NPROCESSORS_ONLN)
  memory=$(awk '/MemAvailable/ { print int($2 / 1500000) }' /proc/meminfo 2>/dev/null || echo "$cores")
  (( memory < 1 )) && memory=1
  echo $(( cores < memory ? cores : memory ))
}

# quietly COMMAND...: its output is shown only if it fails, the errors first: a compiler's notes can be hundreds of lines.
quietly() {
  local log status=0
  log=$(mktemp)
  "$@" >"$log" 2>&1 || status=$?
  if (( status != 0 )); then
    grep -m 20 -E '(error|Error|FAILED)[: ]' "$log" >&2 || true
    say "the end of the output:"
    tail -n 30 "$log" >&2
  fi
  rm -f "$log"
  return "$status"
}
