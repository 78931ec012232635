# Sourced by cpu_suite.sh and gpu_suite.sh: `piece NAME FILE COMMAND...` runs one measurement.
#
# FILE is what the piece leaves in $out, "-" for nothing but its log. A piece whose file exists, or
# which pieces.log marks as done, is not run again unless FORCE=1 or FORCE=NAME. DRY=1 prints the
# commands only. A piece is stopped after LIMIT seconds (560). Logs go to $logs, by default $out.
python=${PYTHON:-python3}
export PYTHONUNBUFFERED=1
failed=()

piece() {
  local name=$1 file=$2 again=0
  shift 2
  : "${logs:=$out}"
  if [ "${DRY:-0}" = 1 ]; then
    echo "$name: $*"
    return 0
  fi
  [ "${FORCE:-0}" = 1 ] || [ "${FORCE:-0}" = "$name" ] && again=1
  if [ "$again" = 0 ]; then
    if [ "$file" != - ] && [ -s "$out/$file" ]; then
      echo "$name: $file is there"
      return 0
    fi
    if [ "$file" = - ] && grep -q "^$name done" "$logs/pieces.log" 2>/dev/null; then
      echo "$name: done before"
      return 0
    fi
  fi
  mkdir -p "$logs"
  echo "== $name: $*"
  local start=$SECONDS status word=done
  timeout "${LIMIT:-560}" "$@" 2>&1 | tee "$logs/$name.log"
  status=${PIPESTATUS[0]}
  if [ "$status" != 0 ]; then
    word="failed ($status)"
    failed+=("$name")
    # What a stopped piece had measured is kept beside, so that the piece runs again.
    [ "$file" != - ] && [ -e "$out/$file" ] && mv "$out/$file" "$out/$file.partial"
  fi
  echo "$name $word in $((SECONDS - start)) s" | tee -a "$logs/pieces.log"
  return 0
}

report_failed() { # exit status of the suite
  [ ${#failed[@]} = 0 ] && return 0
  echo "failed: ${failed[*]}"
  return 1
}
