# The protocol between the supervisor and its workers. This file is the specification: someone can write another worker
# for this supervisor from it, from ledger.h and from README.md. Fields are appended, never renumbered, retyped or
# reused; a default means the old behaviour; an unknown method or field is answered, not fatal.
#
# Transport: Cap'n Proto RPC (two-party) over the unix socket pair that the worker finds at descriptor 3, with
# descriptor passing (at most 253 descriptors a message, hence pages). The supervisor's bootstrap is a Supervisor.
@0xfbc8412bdb0888d3;

using Cxx = import "/capnp/c++.capnp";
$Cxx.namespace("holdfast::schema");

interface Descriptor {
  # An object without methods that carries one file descriptor (SCM_RIGHTS). The receiver dups it out and drops it.
}

# Capability bits. A side announces all it supports; the intersection holds. Bits are positive: a bit never means that
# something is missing.
const capServeReads :UInt64 = 1;        # grant, park, resume, the ledger (the first protocol)
const capMetadataHandover :UInt64 = 2;  # yieldMetadata, takeMetadata
const capPrepare :UInt64 = 4;           # prepare: a worker can load all mounts long before it is told to serve them
const capTrial :UInt64 = 8;             # samples, replay, addMounts, serve(trial), endTrial, distrust; answers PROBE_LIVE (probe.h)
const capHealth :UInt64 = 16;           # ping says which mounts are held back, and knows every loop of the worker
const capReattach :UInt64 = 32;         # Welcome.state; keeps what it was given and brings it to the next supervisor
const capNeverSupported :UInt64 = 0x8000000000000000;  # reserved: no build ever announces it (for tests)

struct Hello {
  # A worker introduces itself.
  capabilities @0 :UInt64;
  build @1 :Text;        # version and build id, for people
  token @2 :Data;        # the secret from HOLDFAST_TOKEN: proves that this is the process the supervisor started
  pid @3 :UInt32;
  thread @4 :UInt32;     # a thread of it that lives as long as the process, and is not its first: on Linux 6.9 and later its end is
                         # seen milliseconds before memory and descriptors of a killed worker are gone. 0: none is named
}

struct Welcome {
  capabilities @0 :UInt64;      # the intersection
  generation @1 :UInt64;        # of this worker; never reused within one state folder
  vaultId @2 :Data;             # 16 random bytes, new each time the supervisor starts without inherited state
  ledger @3 :Descriptor;        # this worker's own ledger (memfd), layout in ledger.h
  requestPipes @4 :List(PipePair);  # one a ledger slot, in order; the supervisor keeps duplicates
  snapshotListener @5 :Descriptor;  # listening unix socket of the snapshots gRPC API
  stateDir @6 :Text;
  runtimeDir @7 :Text;
  state @8 :Descriptor;         # the supervisor's state (read-only memfd, opaque to the worker): kept for Control.reattach
  controlSocket @9 :Text;       # where the next supervisor listens for reattach; empty: it does not
}

struct PipePair {
  readEnd @0 :Descriptor;
  writeEnd @1 :Descriptor;
}

struct InitOptions {
  # How the supervisor shall answer FUSE_INIT. It answers the bits of `flags` that the kernel offered.
  flags @0 :UInt64;             # FUSE_INIT flags, flags2 in the upper half
  maxBackground @1 :UInt16 = 64;
  congestionThreshold @2 :UInt16 = 48;
  maxPages @3 :UInt16 = 256;
  maxStackDepth @4 :UInt32;     # 1 when passthrough is wanted, else 0
  readAheadKib @5 :UInt32;      # of the mount's bdi; 0 = the kernel's default
  maxReadahead @6 :UInt32;      # 0 = what the kernel offered
}

enum MountState {
  mounting @0;
  live @1;
  detached @2;   # umount(2) done, still used by a container's overlay: must be served
  gone @3;
}

struct MountEntry {
  mountId @0 :UInt64;
  state @1 :MountState;
  path @2 :Text;                # absolute, under the state folder
  device @3 :Descriptor;        # /dev/fuse, O_NONBLOCK; a dup, all generations share one open file description
  initRequest @4 :Data;         # the kernel's FUSE_INIT, header included
  initReply @5 :Data;           # what the supervisor answered, header included
  blob @6 :Data;                # what the worker attached (mount_blob.capnp); the supervisor never reads it
}

struct OldLedger {
  # The ledger of a worker that is dead or parked and may still hold unanswered requests.
  generation @0 :UInt64;
  ledger @1 :Descriptor;
  requestPipes @2 :List(PipePair);
  ownerExited @3 :Bool;         # its pidfd has fired: no thread of it can still write
  ownerHung @4 :Bool;           # it was killed because it hung: a slot that it was executing is a suspect (one strike more)
}

struct Takeover {
  # What a worker that is to serve would ask for first, as it was when it was told so: reads need not wait for the asking.
  lastMount @0 :UInt64;         # no live or detached mount has a higher id. Whoever asked for mounts before may lack one with a lower id,
                                # which was being made then: ask for all when a ledger names it, and soon in any case
  ledgers @1 :List(OldLedger);  # as from oldLedgers, if they fit into one page
  moreLedgers @2 :Bool;         # they do not: ask
}

struct SampleRequest {
  # A request that the running worker can answer from what is on this disk, and its answer.
  mountId @0 :UInt64;
  request @1 :Data;             # the kernel's bytes, header included
  replyDigest @2 :Data;         # SHA-256 (32 bytes) of fuse_out_header.error (little-endian) and what follows the header, with
                                # all times-to-live (entry_valid, attr_valid and their nsec) set to 0
}

enum SampleKind {
  file @0;                      # digest of the bytes [offset, offset + length)
  folder @1;                    # digest of its names without "." and "..", sorted bytewise, each followed by a 0 byte
  absent @2;                    # there is no such name
}

struct SampleFile {
  # Something that a path of a mount must show. Wholly on this disk, so that looking at it needs no network.
  mountId @0 :UInt64;
  kind @1 :SampleKind;
  path @2 :Data;                # relative to the mount's root, no leading slash; "" is the root
  offset @3 :UInt64;
  length @4 :UInt64;
  digest @5 :Data;              # SHA-256
}

struct HeldMount {
  mountId @0 :UInt64;
  device @1 :Descriptor;
}

interface Supervisor {
  register @0 (hello :Hello, worker :Worker, admin :Capability) -> (welcome :Welcome);
  # First call. `admin` is an admin.capnp WorkerAdmin, handed to holdfastctl unread.

  mount @1 (path :Text, options :InitOptions, blob :Data) -> (entry :MountEntry);
  # Mounts a FUSE file system (MS_RDONLY|MS_NODEV, allow_other, default_permissions) on an existing folder under the state
  # folder, answers FUSE_INIT and returns the live mount. Off the supervisor's main loop; concurrent calls are fine. Only the
  # metadata owner may call it (from the moment it is sent takeMetadata until it returns from yieldMetadata).

  setBlob @2 (mountId :UInt64, blob :Data) -> ();
  # Replaces the blob; on return it is what a successor will see.

  unmount @3 (mountId :UInt64) -> (state :MountState);
  # umount(2). A layer in use becomes `detached`, else `gone`. Only the metadata owner may call it.

  mounts @4 (after :UInt64, limit :UInt32) -> (entries :List(MountEntry), more :Bool);
  # A page of the vault in mountId order: entries with mountId > after that are live or detached. At most 200.

  oldLedgers @5 (after :UInt64) -> (ledgers :List(OldLedger), more :Bool);
  # A page (of at most 7, because each carries 33 descriptors) of the ledgers with generation > after that may hold
  # unanswered requests, in order of generation, the caller's own left out. Ask on with the last generation while `more`.

  drained @6 (generation :UInt64) -> ();
  # No unanswered request is left in that ledger. Counts when its owner's exit is proven; the supervisor then drops it. It
  # drops a ledger by itself when the owner's exit is proven and nothing unanswered is in it.

  progress @7 (step :Text) -> ();
  # Nobody answers or calls it. Its number stays taken.
}

interface Worker {
  # The methods from `prepare` on are called only when the capability that they need, if any, was agreed on.

  serve @0 (trial :Bool, touched :Descriptor, takeover :Takeover) -> ();
  # Take over reads: fetch the vault's pages and the old ledgers, adopt every record, start reading. Returns when every
  # mount is being read. May be called while the predecessor is being killed.
  # takeover: missing from a supervisor of before; then ask for all of it.
  # trial: until endTrial, names and attributes are answered with a time-to-live of 0, nothing is kept over a close
  # (no KEEP_CACHE), no answer makes the kernel stop asking (ENOSYS) unless the mount's blob says that it was given before,
  # and every node answered for is noted in `touched` (memory laid out as touched.h).

  ownerExited @1 (generation :UInt64) -> ();
  # That worker's exit is proven: walk its ledger once more.

  takeMetadata @2 () -> ();
  # Open the metadata store, start accepting snapshots calls, restore mounts that the vault does not hold, allow eviction.
  # Begins with a fresh walk of mounts(): a mount that the predecessor was still making is in it now, and must be served.
  # After an error this worker serves reads without the metadata, and is asked again some seconds later.

  park @3 () -> ();
  # Stop reading and stop answering: every request not answered stays in the ledger. Returns when no thread holds one.
  # A worker that answers this, resume() or, in a swap, yieldMetadata() with an error is killed and counts as dead.

  resume @4 () -> ();
  # Undo park: adopt what is left in the own ledger and in the other ledgers, read again. Comes also without a park() before
  # it, or while one is under way, and is followed by takeMetadata() if this worker has yielded. Ends a trial, too.

  yieldMetadata @5 () -> ();
  # Finish the metadata sections under way, close the store, stop accepting. Calls still open on old connections are
  # forwarded to whoever listens from now on. After the return this worker writes nothing.

  retire @6 () -> ();
  # Forward old calls until their connections end, then exit with 0. Returns at once.

  mountsGone @7 (mountIds :List(UInt64)) -> ();
  # These mounts exist no more: drop their descriptors, pins and blobs.

  ping @8 () -> (loopAgeNanos :UInt64, heldBack :List(UInt64), loop :Text);
  # Answered on the event loop. loopAgeNanos: how long the worker's most backward loop has been at one turn, or its oldest local
  # work (not: waiting for the network) under way; `loop` names it. heldBack: mounts that the worker does not read on purpose,
  # because they have as many unanswered requests as one mount may have.

  prepare @9 () -> ();
  # (capPrepare) Fetch the vault's pages and get ready to serve them, without reading any: no descriptor may be in an epoll.
  # May be called again. serve() then needs to fetch only what was mounted since.

  samples @10 (limit :UInt32) -> (requests :List(SampleRequest), files :List(SampleFile));
  # (capTrial) Of the metadata owner: at most `limit` of each, spread over mounts; recent requests first. Nothing is fetched.
  # An error, or none within 10 s: the successor is compared with nothing.

  replay @11 (requests :List(SampleRequest)) -> (different :List(UInt32), skipped :UInt32);
  # (capTrial) Execute these as if the kernel had sent them, without answering it, and compare. Indexes of those whose reply
  # differs; skipped: how many need content that is not on this disk (not a difference). Comes after prepare().

  addMounts @12 (entries :List(MountEntry)) -> ();
  # (capTrial) Serve these mounts now, whatever else was asked: private ones that are not in the vault's pages, over blobs that are.

  endTrial @13 () -> ();
  # (capTrial) The worker has proved itself: from now on it answers as usual.

  distrust @14 (generation :UInt64, touched :Descriptor, vaultId :Data) -> ();
  # (capTrial) What `generation` answered and stored in its trial is not to be believed; its exit is proven. Make the kernel forget
  # every node noted in `touched` (all nodes of all mounts when it overflowed or is missing), and verify content that was stored
  # before now once more before its first use: marks made under another vault id than this one do not count.

  heldMounts @15 (after :UInt64) -> (mounts :List(HeldMount), more :Bool);
  # (capReattach) A page, of at most 200 in order of mountId, of the descriptors that this worker was given and still holds.

  heldLedgers @16 (after :UInt64) -> (ledgers :List(OldLedger), more :Bool);
  # (capReattach) As Supervisor.oldLedgers, of the ledgers that this worker holds, its own included.

  heldListener @17 () -> (snapshotListener :Descriptor);
  # (capReattach)

  swapAhead @18 (over :Bool) -> ();
  # Somebody has asked for a swap. Copying, starting and checking the candidate takes processors for some tenths of a second; what this
  # worker reads meanwhile shall not wait for them. over: it was answered, whatever became of it. Nothing depends on it, so there
  # is no capability: a worker that does not know the method says so.
}
