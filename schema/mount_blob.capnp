# The opaque blob that a worker attaches to a mount and that its successor, of any build, serves the mount from. It must
# suffice to serve reads: no database is consulted. Evolution rules as in handover.capnp.
@0xecf8dd1fb0c319c9;

using Cxx = import "/capnp/c++.capnp";
$Cxx.namespace("holdfast::schema");

struct MountBlob {
  layerDigest @0 :Text;        # sha256:... of the compressed blob
  indexDigest @1 :Text;        # SHA-256 (hex) of the LayerIndex; served from that index or not at all
  numberingVersion @2 :UInt32; # of the nodeids
  imageRef @3 :Text;           # where to fetch from
  snapshotId @4 :UInt64;
  blobSize @5 :UInt64;         # compressed bytes
  noXattrs @6 :Bool;           # GETXATTR answered ENOSYS: the kernel remembers it for the mount's life
  zeroOpen @7 :Bool;           # OPEN answered ENOSYS
  overlayOpaqueUser @8 :Bool;  # opaque directories as user.overlay.opaque (false: trusted.overlay.opaque)
}
