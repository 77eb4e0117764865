# What the messages of a build to come may look like: copies of the structs of handover.capnp and mount_blob.capnp
# with fields appended by the rules of evolution (data and pointers), and of an enum with an enumerant that nobody knows yet. For
# tests only: today's build must take from such bytes what it knows.
@0xd4a1c4fb0c1a6e0d;

using Cxx = import "/capnp/c++.capnp";
$Cxx.namespace("holdfast::future");

enum MountState {
  mounting @0;
  live @1;
  detached @2;
  gone @3;
  frozen @4;      # of the future
}

struct More {
  # Appended to every struct.
  text @0 :Text;
  numbers @1 :List(UInt64);
}

struct Hello {
  capabilities @0 :UInt64;
  build @1 :Text;
  token @2 :Data;
  pid @3 :UInt32;
  thread @4 :UInt32;
  futureFlag @5 :Bool;
  futureNumber @6 :UInt64;
  futureMore @7 :More;
}

struct Welcome {
  capabilities @0 :UInt64;
  generation @1 :UInt64;
  vaultId @2 :Data;
  ledger @3 :Capability;
  requestPipes @4 :List(PipePair);
  snapshotListener @5 :Capability;
  stateDir @6 :Text;
  runtimeDir @7 :Text;
  state @8 :Capability;
  controlSocket @9 :Text;
  futureNumber @10 :UInt64;
  futureObject @11 :Capability;
  futureMore @12 :More;
}

struct PipePair {
  readEnd @0 :Capability;
  writeEnd @1 :Capability;
  futureEnd @2 :Capability;
  futureSize @3 :UInt32;
}

struct InitOptions {
  flags @0 :UInt64;
  maxBackground @1 :UInt16 = 64;
  congestionThreshold @2 :UInt16 = 48;
  maxPages @3 :UInt16 = 256;
  maxStackDepth @4 :UInt32;
  readAheadKib @5 :UInt32;
  maxReadahead @6 :UInt32;
  futureNumber @7 :UInt64;
  futureMore @8 :More;
}

struct MountEntry {
  mountId @0 :UInt64;
  state @1 :MountState;
  path @2 :Text;
  device @3 :Capability;
  initRequest @4 :Data;
  initReply @5 :Data;
  blob @6 :Data;
  futureNumber @7 :UInt64;
  futureObject @8 :Capability;
  futureMore @9 :More;
}

struct OldLedger {
  generation @0 :UInt64;
  ledger @1 :Capability;
  requestPipes @2 :List(PipePair);
  ownerExited @3 :Bool;
  ownerHung @4 :Bool;
  futureFlag @5 :Bool;
  futureNumber @6 :UInt64;
  futureMore @7 :More;
}

struct MountBlob {
  layerDigest @0 :Text;
  indexDigest @1 :Text;
  numberingVersion @2 :UInt32;
  imageRef @3 :Text;
  snapshotId @4 :UInt64;
  blobSize @5 :UInt64;
  noXattrs @6 :Bool;
  zeroOpen @7 :Bool;
  overlayOpaqueUser @8 :Bool;
  futureFlag @9 :Bool;
  futureNumber @10 :UInt64;
  futureMore @11 :More;
}

# Parameters and results of methods, which are structs like any other.

struct RegisterParams {
  hello @0 :Hello;
  worker @1 :Capability;
  admin @2 :Capability;
  futureMore @3 :More;
}

struct RegisterResults {
  welcome @0 :Welcome;
  futureMore @1 :More;
}

struct MountParams {
  path @0 :Text;
  options @1 :InitOptions;
  blob @2 :Data;
  futureNumber @3 :UInt64;
  futureMore @4 :More;
}

struct MountsResults {
  entries @0 :List(MountEntry);
  more @1 :Bool;
  futureMore @2 :More;
}

struct OldLedgersResults {
  ledgers @0 :List(OldLedger);
  more @1 :Bool;
  futureMore @2 :More;
}

struct PingResults {
  loopAgeNanos @0 :UInt64;
  heldBack @1 :List(UInt64);
  loop @2 :Text;
  futureNumber @3 :UInt64;
  futureMore @4 :More;
}

struct Nothing {
  # Of a method that has no parameters or no results today.
  futureNumber @0 :UInt64;
  futureMore @1 :More;
}
