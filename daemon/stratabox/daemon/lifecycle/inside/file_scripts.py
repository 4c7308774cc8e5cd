"""What is done to files in guests, as scripts of the POSIX shell. Pure.

Nothing else of the guest is needed than the programs that every Linux has; busybox's do. What goes
wrong is told in the C locale's words, which `file_errors` reads. Each script that changes a file
ends with the line of `STAT` for it.
"""

from __future__ import annotations

STAT = "%f %s %u %g %Y"
"""For stat -c: mode in hex, bytes, owner, group, seconds since 1970."""

MARK_BYTES = 32
"""Behind the last byte of what is written aside comes a mark of this size: without it, the stream
was broken off, and what came of it is removed. The end of the input alone would not tell."""
BROKEN_OFF = 75

_WORDS = r"""
LC_ALL=C
export LC_ALL
umask 022
fail() { printf 'sh: %s\n' "$1" >&2; exit 1; }
there() {
  if [ ! -e "$1" ] && [ ! -L "$1" ]; then
    ls -d -- "$1" >/dev/null || exit 1
    fail 'No such file or directory'
  fi
}
enter() {
  if [ ! -d "$1" ]; then
    there "$1"
    [ -e "$1" ] || fail 'No such file or directory'
    fail 'Not a directory'
  fi
  cd -- "$1" 2>/dev/null || fail 'Permission denied'
}
real() {
  if [ -L "$1" ]; then
    path=$(readlink -f -- "$1" && echo x) || fail 'No such file or directory'
    path=${path%??}
  else
    path=$1
  fi
}
"""
_TELL = f"exec stat -c '{STAT}' -- "

# $1 file, $2 offset, $3 length or nothing. dd moves the offset of the descriptor, which it shares.
READ = (
    _WORDS
    + f"""
there "$1"
[ ! -d "$1" ] || fail 'Is a directory'
[ ! -p "$1" ] && [ ! -S "$1" ] || fail 'it is no file with content'
exec <"$1" || exit 1
stat -L -c '{STAT}' /proc/self/fd/0 2>/dev/null || stat -L -c '{STAT}' -- "$1" || exit 1
[ "$2" = 0 ] || dd bs=1 skip="$2" count=0 2>/dev/null
"""
    + """
[ -z "$3" ] || exec head -c "$3"
exec cat
"""
)

# $1 file, $2 replace|create|truncate|append|overwrite, $3 mode or nothing, $4 time or nothing, $5
# 1: make what is missing above, $6 the mark, $7 owner:group of a new file or nothing, $8 its mode
# where $3 is nothing, $9 1: on the disk before it is told.
WRITE = (
    _WORDS
    + """
real "$1"
how=$2 mode=$3 flush=$9 new=
[ ! -d "$path" ] || fail 'Is a directory'
folder=${path%/*}
[ "$5" != 1 ] || mkdir -p -- "${folder:-/}" || exit 1
if [ ! -d "${folder:-/}" ]; then
  there "$folder"
  fail 'Not a directory'
fi
if [ "$how" = create ] && { [ -e "$path" ] || [ -L "$1" ]; }; then fail 'File exists'; fi
[ -e "$path" ] || new=1 mode=${mode:-${8:-0644}}
durable() { [ "$flush" != 1 ] || sync -- "$1" 2>/dev/null || sync; }
if [ "$how" = replace ] && [ -e "$path" ] && [ ! -f "$path" ]; then how=direct; fi
case $how in
append) cat >>"$path" || exit 1 ;;
truncate) cat >"$path" || exit 1 ;;
overwrite) cat 1<>"$path" || exit 1 ;;
direct)
  aside=$(mktemp) || exit 1
  trap 'rm -f -- "$aside"' EXIT
  cat >"$aside" || exit 1
  [ "$(tail -c 32 -- "$aside")" = "$6" ] || exit 75
  size=$(stat -c %s -- "$aside") || exit 1
  head -c "$((size - 32))" -- "$aside" | cat >"$path" || exit 1
  ;;
*)
  aside=$(mktemp -- "$folder/.stratabox.XXXXXX") || exit 1
  trap 'rm -f -- "$aside"' EXIT
  trap 'exit 75' HUP INT TERM PIPE
  cat >"$aside" || exit 1
  [ "$(tail -c 32 -- "$aside")" = "$6" ] || exit 75
  size=$(stat -c %s -- "$aside") || exit 1
  dd if=/dev/null of="$aside" bs=1 seek="$((size - 32))" count=0 2>/dev/null || exit 1
  if [ -e "$path" ]; then
    own=$(stat -c '%u:%g %a' -- "$path") || exit 1
    chown -- "${own% *}" "$aside" 2>/dev/null
    mode=${mode:-${own#* }}
  elif [ -n "$7" ]; then
    chown -- "$7" "$aside" || exit 1
  fi
  chmod -- "$mode" "$aside" || exit 1
  [ -z "$4" ] || touch -c -d "@$4" -- "$aside" || exit 1
  durable "$aside"
  if [ "$how" = create ]; then
    ln -T -- "$aside" "$path" || exit 1
    rm -f -- "$aside"
  else
    mv -fT -- "$aside" "$path" || exit 1
  fi
  trap - EXIT
  [ "$flush" != 1 ] || sync -- "${folder:-/}" 2>/dev/null
"""
    + f"""
  {_TELL} "$path"
  ;;
esac
if [ -n "$new" ] && [ -n "$7" ]; then chown -- "$7" "$path" || exit 1; fi
if [ -n "$mode" ]; then chmod -- "$mode" "$path" || exit 1; fi
[ -z "$4" ] || touch -c -d "@$4" -- "$path" || exit 1
durable "$path"
{_TELL} "$path"
"""
)

# $1 directory, $2 mode or nothing, $3 1: with those above, $4 owner:group of what is made, or
# nothing
MAKE_DIRECTORY = (
    _WORDS
    + f"""
if [ "$3" = 1 ]; then set -- "$1" "$2" -p "$4"; else set -- "$1" "$2" '' "$4"; fi
made=
if [ -n "$4" ] && [ ! -e "$1" ]; then
  made=$1
  while up=${{made%/*}}; [ -n "$up" ] && [ ! -e "$up" ]; do made=$up; done
fi
mkdir ${{3:+-p}} ${{2:+-m}} ${{2:+"$2"}} -- "$1" || exit 1
[ -z "$made" ] || chown -R -- "$4" "$made" || exit 1
{_TELL} "$1"
"""
)

# $1 file, $2 1: with all that is in it, $3 1: say how many
REMOVE = (
    _WORDS
    + """
there "$1"
if [ "$3" = 1 ] && [ "$2" = 1 ]; then
  find "$1" -print0 2>/dev/null | tr -dc '\\0' | wc -c
else
  echo 1
fi
if [ ! -d "$1" ] || [ -L "$1" ]; then exec rm -f -- "$1"; fi
[ "$2" = 1 ] || exec rmdir -- "$1"
exec rm -rf -- "$1"
"""
)

NO_SOURCE = 3

# $1 from, $2 to, $3 1: not over what is there
MOVE = (
    _WORDS
    + f"""
(there "$1") || exit {NO_SOURCE}
if [ "$3" = 1 ] && {{ [ -e "$2" ] || [ -L "$2" ]; }}; then fail 'File exists'; fi
mv -fT -- "$1" "$2" || exit 1
{_TELL} "$2"
"""
)

# $1 file, $2 mode or nothing, $3 owner:group or nothing, $4 1: with all that is in it
CHANGE = (
    _WORDS
    + f"""
there "$1"
real "$1"
if [ -n "$3" ]; then
  if [ "$4" = 1 ]; then chown -Rh -- "$3" "$path"; else chown -- "$3" "$path"; fi || exit 1
fi
if [ -n "$2" ]; then
  if [ "$4" = 1 ]; then chmod -R -- "$2" "$path"; else chmod -- "$2" "$path"; fi || exit 1
fi
{_TELL} "$path"
"""
)

# $1 link, $2 where it leads to
SYMLINK = (
    _WORDS
    + f"""
if [ -e "$1" ] || [ -L "$1" ]; then fail 'File exists'; fi
ln -sT -- "$2" "$1" || exit 1
{_TELL} "$1"
"""
)

# $1 directory
PACK = (
    _WORDS
    + """
enter "$1"
exec tar -cf - .
"""
)

# $1 directory, made where it is not there. -o: owned by who unpacks.
UNPACK = (
    _WORDS
    + """
[ -d "$1" ] || mkdir -- "$1" || exit 1
enter "$1"
exec tar -xpof -
"""
)

# $1 bytes of the program, then its arguments. The program comes first on the input, is put where a
# program may run, and removes its own file.
WATCH = (
    _WORDS
    + """
[ "$(uname -m)" = x86_64 ] || exit 126
size=$1 have=
shift
for folder in /run /dev/shm /tmp /var/tmp "$HOME"; do
  file=$(mktemp "$folder/.stratabox.XXXXXX" 2>/dev/null) || continue
  [ "$have" ] || head -c "$size" >"$file" || { rm -f -- "$file"; continue; }
  [ -z "$have" ] || cat -- "$have" >"$file"
  chmod 700 "$file"
  if "$file" 2>/dev/null; then
    [ -z "$have" ] || rm -f -- "$have"
    exec "$file" "$@"
  fi
  if [ "$have" ]; then rm -f -- "$file"; else have=$file; fi
done
[ -z "$have" ] || rm -f -- "$have"
exit 126
"""
)

# $1 file: whether it is a directory, and what is really there
KIND = (
    _WORDS
    + """
there "$1"
[ -e "$1" ] || fail 'No such file or directory'
real "$1"
if [ -d "$path" ]; then
  enter "$path"
  printf 'd%s' "$path"
else
  printf 'f%s' "$path"
fi
"""
)
