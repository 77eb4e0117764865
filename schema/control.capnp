# holdfastctl's interface to the supervisor, over supervisor.sock (mode 0600, peers checked with SO_PEERCRED). The
# bootstrap is a Control. Works while the worker is dead. Evolution rules as in handover.capnp.
@0x8b8a1251c7e4308f;

using Cxx = import "/capnp/c++.capnp";
using Handover = import "/schema/handover.capnp";
$Cxx.namespace("holdfast::schema");

struct WorkerStatus {
  generation @0 :UInt64;
  pid @1 :UInt32;
  role @2 :Text;           # starting, candidate, owner, parked, retiring, dying
  build @3 :Text;
  executable @4 :Text;     # SHA-256 of the private copy
  startedWallNanos @5 :Int64;
  requestsReceived @6 :UInt64;
  requestsAnswered @7 :UInt64;
}

struct SwapStatus {
  kind @0 :Text;           # "none", "upgrade", "crash"
  result @1 :Text;         # "done", "failed: why", "running"
  finishedWallNanos @2 :Int64;
  pauseNanos @3 :UInt64;   # from the moment the predecessor stopped reading until the successor read
  requestsCarriedOver @4 :UInt64;  # found unanswered in the predecessor's ledger
  fromBuild @5 :Text;
  toBuild @6 :Text;
}

struct Status {
  supervisorBuild @0 :Text;
  supervisorPid @1 :UInt32;
  startedWallNanos @2 :Int64;
  phase @3 :Text;          # the swap machine's state
  workers @4 :List(WorkerStatus);
  mountsLive @5 :UInt64;
  mountsDetached @6 :UInt64;
  lastSwap @7 :SwapStatus;
  crashes @8 :UInt64;      # workers that ended without being asked, since the supervisor started
  stateDir @9 :Text;
  warnings @10 :List(Text);
  requestsCarriedOverTotal @11 :UInt64;
  swaps @12 :UInt64;
}

interface Control {
  status @0 () -> (status :Status);

  upgrade @1 (path :Text, force :Bool) -> (swap :SwapStatus, changed :Bool);
  # Swaps to the worker at `path` (empty: the path the supervisor was started with). Returns when the swap is over; the
  # call fails with the reason when the old worker still serves. The running build again is a no-op unless forced.

  mounts @2 (after :UInt64, limit :UInt32) -> (entries :List(Handover.MountEntry), more :Bool);
  # As Supervisor.mounts, without the descriptors.

  ledgers @3 () -> (ledgers :List(Handover.OldLedger));
  # All ledgers, the running worker's included, for `holdfastctl inflight`. Read-only by convention.

  workerAdmin @4 () -> (admin :Capability);
  # The running worker's admin.capnp WorkerAdmin; fails while no worker runs.
}
