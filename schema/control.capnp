# holdfastctl's interface to the supervisor, over supervisor.sock (mode 0600, peers checked with SO_PEERCRED). The
# bootstrap is a Control. Works while the worker is dead. Evolution rules as in handover.capnp.
@0x8b8a1251c7e4308f;

using Cxx = import "/capnp/c++.capnp";
using Handover = import "/schema/handover.capnp";
$Cxx.namespace("holdfast::schema");

struct WorkerStatus {
  generation @0 :UInt64;
  pid @1 :UInt32;
  role @2 :Text;           # starting, candidate, owner, parked, retiring, dying, spare
  build @3 :Text;
  executable @4 :Text;     # SHA-256 of the private copy
  startedWallNanos @5 :Int64;
  requestsReceived @6 :UInt64;
  requestsAnswered @7 :UInt64;
}

struct SwapStatus {
  kind @0 :Text;           # "none", "upgrade", "rollback", "crash", "hang", "supervisor"
  result @1 :Text;         # "done", "failed: why", "running"
  finishedWallNanos @2 :Int64;
  pauseNanos @3 :UInt64;   # from the moment the predecessor stopped reading until the successor read; of one that was
                           # rolled back, also until the predecessor read again
  requestsCarriedOver @4 :UInt64;  # found unanswered in the predecessor's ledger
  fromBuild @5 :Text;
  toBuild @6 :Text;
  steps @7 :List(SwapStep);  # of an upgrade or rollback, in order; the last one is the one that failed
}

struct SwapStep {
  name @0 :Text;           # "copy", "start", "prepare", "rehearse", "park", "serve", "probe", "yield", "commit", ...
  nanos @1 :UInt64;        # how long it took
  detail @2 :Text;         # what was checked, or what went wrong
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
  hangs @13 :UInt64;       # of the crashes: workers killed because they hung
  probationSeconds @14 :UInt64;    # left of the running build's probation; 0: it is proven
  lastGood @15 :Text;              # SHA-256 of the build that crashes in probation bring back; empty: none yet
  spareState @16 :Text;            # "off", "none", "starting", "ready"
  supervisorRestarts @17 :UInt64;  # how often state was taken over from an earlier supervisor process
  stateSource @18 :Text;           # where this process got its state from: "new", "fd store", "worker"
  fdStore @19 :Bool;               # descriptors are kept by the service manager
  inProgress @20 :List(SwapStep);  # of the swap under way; the last one has not ended
  lastDeath @21 :Text;     # how the last worker ended that was not asked to (as in crashes), or why one could not be started;
                           # empty: none since this process started
  lastDeathWallNanos @22 :Int64;
}

interface Progress {
  # Called back while a long command runs.
  step @0 (step :SwapStep, done :Bool) -> ();
  # done: false when a step begins (nanos is 0), true when it has ended well. One that fails is told by the command's error.
}

interface Control {
  status @0 () -> (status :Status);

  upgrade @1 (path :Text, force :Bool, progress :Progress) -> (swap :SwapStatus, changed :Bool);
  # Swaps to the worker at `path` (empty: the path the supervisor was started with). Returns when the swap is over; the
  # call fails with the reason when the old build still serves. The running build again is a no-op unless forced.

  mounts @2 (after :UInt64, limit :UInt32) -> (entries :List(Handover.MountEntry), more :Bool);
  # As Supervisor.mounts, without the descriptors.

  ledgers @3 () -> (ledgers :List(Handover.OldLedger));
  # All ledgers, the running worker's included, for `holdfastctl inflight`. Read-only by convention.

  workerAdmin @4 () -> (admin :Capability);
  # The running worker's admin.capnp WorkerAdmin; fails while no worker runs.

  rollback @5 (progress :Progress) -> (swap :SwapStatus);
  # Swaps back to the build that ran before the running one, by the same steps as an upgrade. Fails when none is kept.

  checkRollback @6 () -> (ready :Bool, executable :Text, reason :Text);
  # Starts the build that a rollback would bring back with --self-test (at most 5 s). reason: why not, else what it printed.

  reattach @7 (hello :Handover.Hello, worker :Handover.Worker, admin :Capability, state :Handover.Descriptor,
               generation :UInt64, holdsMetadata :Bool) -> (supervisor :Handover.Supervisor, vaultId :Data);
  # A worker that outlived its supervisor introduces itself to the next one with the token it was started with. It goes on
  # reading meanwhile, and is then told what to be: resume() (and takeMetadata() unless it holds the metadata), or SIGKILL.
  # `state` is Welcome.state: a supervisor without a state of its own (no service manager kept it) starts from that.

  mountPrivate @8 (name :Text, blob :Data, options :Handover.InitOptions) -> (mountId :UInt64, path :Text);
  # Nobody answers it: WorkerAdmin.mountPrivate took its place. Its number stays taken.
}
