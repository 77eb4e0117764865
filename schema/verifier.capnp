# The protocol between the supervisor and its verifier, the program that decides whether a candidate may have a swap. The
# supervisor starts one for each task and ends it after that; it has nothing to lose and may be killed at any moment.
#
# Transport: Cap'n Proto RPC (two-party) over the unix socket that the verifier finds at descriptor 3, with descriptor
# passing. The verifier's bootstrap is a Verifier. When the connection ends, it ends. Fields and methods are appended,
# never renumbered: verifier and supervisor may be of different builds.
@0xe5b2a1c94d7f3086;

using Cxx = import "/capnp/c++.capnp";
using Handover = import "handover.capnp";
$Cxx.namespace("holdfast::schema");

interface Verifier {
  # An error's text is the reason, for people.

  rehearse @0 (owner :Handover.Worker, candidate :Handover.Worker, mounts :MountView, canaryFolder :Text) -> (summary :Text);
  # Both workers know capTrial. Without an owner nothing is asked of the running worker, which may answer wrongly. The owner
  # names requests it answered and things its mounts show (Worker.samples), all of it on this disk. The candidate must answer the requests with the same bytes (replay), and then show the same things in canaries:
  # private mounts in `canaryFolder` with the blobs of real ones (addMounts). No container is touched. When the owner names nothing,
  # or cannot (the summary says so), the roots of canaries are opened.

  probeLive @1 (generation :UInt64) -> (summary :Text);
  # After rehearse: up to 3 of the mounts that it had samples of, or any, must say that `generation` serves them (probe.h), and show
  # the same things past the page cache.

  selfTest @2 (executable :Handover.Descriptor) -> (passed :Bool, output :Text);
  # Starts this worker program with --self-test, which touches nothing. `output`: what it printed, or what went wrong.
}

interface MountView {
  # What a verifier may know of the supervisor's mounts.

  live @0 (mountIds :List(UInt64)) -> (entries :List(Handover.MountEntry));
  # Those of them that are live, in the same order, without their descriptors. Of none: any three.

  newMountId @1 () -> (mountId :UInt64);
  # Never given before, nor again.
}
