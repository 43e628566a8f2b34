#!/bin/sh
# mpirun, for machines that are taken away: a SIGTERM to this script reaches the ranks as SIGUSR1.
#
#   launchers/mpirun.sh -np 8 python launchers/pretrain.py --ds_config ds_configs/zero2.json
#
# Open MPI 5 gives its ranks a quarter of a second between SIGTERM and SIGKILL, whatever odls_base_sigkill_timeout says:
# too little to write a checkpoint in. SIGUSR1 it passes on and waits.
trap 'kill -USR1 "$ranks"' TERM
trap 'kill -INT "$ranks"' INT
mpirun "$@" &
ranks=$!
wait "$ranks"
code=$?
while kill -0 "$ranks" 2>/dev/null; do # a signal ended the waiting, not the run
  wait "$ranks"
  code=$?
done
exit "$code"
