# What a supervisor leaves to the next one: the values of its saved state (a map in a memfd, common/durable_map.h), one
# message each. Only supervisors read it, older ones after a downgrade included: fields are appended, never renumbered,
# retyped or reused. Keys: "machine", "m/<mount id>", "w/<generation>", "l/<generation>" (decimal).
#
# Everything is written before the action that it speaks of: what is found here was about to happen or has happened.
@0xb1d04a5c93e7f268;

using Cxx = import "/capnp/c++.capnp";
$Cxx.namespace("holdfast::schema");

struct SavedMount {
  enum State {
    mounting @0;    # mount(2) may have happened; nobody was told of it
    live @1;
    unmounting @2;  # umount(2) may have happened
    detached @3;
  }
  mountId @0 :UInt64;
  state @1 :State;
  path @2 :Text;
  blob @3 :Data;
  initRequest @4 :Data;
  initReply @5 :Data;
  caller @6 :UInt64;        # generation that asked for it
}

struct SavedWorker {
  generation @0 :UInt64;
  pid @1 :UInt32;
  startTicks @2 :UInt64;    # field 22 of /proc/PID/stat: the pid may have been reused
  token @3 :Text;
  executable @4 :Text;      # SHA-256 of the private copy
  build @5 :Text;
  capabilities @6 :UInt64;  # agreed on; 0: it has not registered
  startedWallNanos @7 :Int64;
  killed @8 :Bool;          # was sent SIGKILL
  retired @9 :Bool;         # was told to end when its old calls have
}

struct SavedLedger {
  generation @0 :UInt64;
  pipeInodes @1 :List(UInt64);  # of the request pipes, one a slot, in order
  ownerExited @2 :Bool;
  ownerHung @3 :Bool;
}

struct SavedMachine {
  phase @0 :Text;
  owner @1 :UInt64;
  successor @2 :UInt64;
  holders @3 :List(UInt64);     # may hold the metadata
  running @4 :Text;             # SHA-256 of the executable that crashes start again
  previous @5 :Text;
  lastGood @6 :Text;
  trialGeneration @7 :UInt64;   # this worker answers, or has answered, without having been proven
  probation @8 :Bool;           # the running build is not proven yet
  vaultId @9 :Data;
  restarts @10 :UInt64;         # supervisors that took over
  crashes @11 :UInt64;
  hangs @12 :UInt64;
  swaps @13 :UInt64;
  carriedOver @14 :UInt64;
  runningBuild @15 :Text;
  swapKind @16 :Text;           # of a swap that was asked for and is not over: upgrade or rollback
  swapGeneration @17 :UInt64;   # its candidate
}
