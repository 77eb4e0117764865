# What the supervisor's tests ask of the stand-in worker, through Control.workerAdmin.
@0xd2a7c8e1f03b5596;

using Cxx = import "/capnp/c++.capnp";
using Handover = import "/schema/handover.capnp";
$Cxx.namespace("holdfast::supervisor::testing");

interface FakeAdmin {
  mount @0 (path :Text, options :Handover.InitOptions, blob :Data) -> (entry :Handover.MountEntry);
  unmount @1 (mountId :UInt64) -> (state :Handover.MountState);
  setBlob @2 (mountId :UInt64, blob :Data) -> ();
  info @3 () -> (generation :UInt64, mountIds :List(UInt64), blobs :List(Data), adopted :UInt64, exited :List(UInt64),
                 gone :List(UInt64), openFds :List(Text), listenerWorks :Bool, pagesSeen :UInt32, ledgersSeen :List(UInt64),
                 calls :List(Text));
}
