# What a worker tells holdfastctl (through Control.workerAdmin). Evolution rules as in handover.capnp.
@0xf12a5cad89c9bb74;

using Cxx = import "/capnp/c++.capnp";
$Cxx.namespace("holdfast::schema");

struct LayerInfo {
  digest @0 :Text;             # of the compressed layer blob, sha256:...
  image @1 :Text;              # the reference it was first pulled by
  compressedBytes @2 :UInt64;
  contentBytes @3 :UInt64;     # uncompressed content of its files
  cachedBytes @4 :UInt64;      # of that, on this disk
  mounts @5 :UInt32;
  lastAccessWallNanos @6 :Int64;  # when the hour began in which it was last read: no more is kept; 0: never
  fetchedBytes @7 :UInt64;     # from the network, since the worker started
  indexDigest @8 :Text;        # SHA-256 of the LayerIndex
  files @9 :UInt64;
  touchedBytes @10 :UInt64;    # compressed bytes of the distinct chunks that applications read, since the worker started
  folders @11 :List(Text);     # below the state folder: with the mount's blob, all that serving what is cached of it needs
}

struct SnapshotInfo {
  key @0 :Text;                # the backend key, in full
  parent @1 :Text;
  kind @2 :Text;               # active, view, committed
  id @3 :UInt64;               # names the folder snapshots/<id>
  lazyDigest @4 :Text;         # layer digest when served by FUSE, else empty
  createdWallNanos @5 :Int64;
  image @6 :Text;
}

struct FetchStats {
  requests @0 :UInt64;
  bytes @1 :UInt64;
  failures @2 :UInt64;
  retries @3 :UInt64;
  inFlight @4 :UInt64;
}

struct CacheStats {
  bytes @0 :UInt64;            # on disk now
  limitBytes @1 :UInt64;
  evictedBytes @2 :UInt64;
  damagedChunks @3 :UInt64;    # found damaged on disk and fetched again
  unstoredBytes @4 :UInt64;    # served through because the disk was full or the limit reached
}

struct TraceEvent {
  wallNanos @0 :Int64;
  durationNanos @1 :UInt64;
  event @2 :Text;
  detail @3 :Text;
}

interface WorkerAdmin {
  layers @0 () -> (layers :List(LayerInfo));
  snapshots @1 () -> (snapshots :List(SnapshotInfo));
  stats @2 () -> (fetch :FetchStats, cache :CacheStats);
  trace @3 (limit :UInt32) -> (events :List(TraceEvent));

  mountPrivate @4 (name :Text, blob :Data) -> (path :Text);
  # For `holdfastctl drill`, of a worker that was started with --private: a mount <state>/drill/<name> with that blob, made by the
  # supervisor like any other.
}
