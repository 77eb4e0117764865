// The newest stargz-snapshotter as a proxy snapshotter, for benchmarks beside holdfast: the module's own service behind a
// gRPC server. Usage: stargz-peer -address SOCKET -root DIR -config FILE (JSON of its service.Config).
package main

import (
	"context"
	"encoding/json"
	"flag"
	"log"
	"net"
	"os"

	snapshotsapi "github.com/containerd/containerd/api/services/snapshots/v1"
	"github.com/containerd/containerd/v2/contrib/snapshotservice"
	"github.com/containerd/stargz-snapshotter/service"

	"google.golang.org/grpc"
)

func main() {
	address := flag.String("address", "", "unix socket to listen on")
	root := flag.String("root", "", "state folder")
	configPath := flag.String("config", "", "configuration file")
	flag.Parse()
	text, err := os.ReadFile(*configPath)
	if err != nil {
		log.Fatal(err)
	}
	var config service.Config
	if err := json.Unmarshal(text, &config); err != nil {
		log.Fatal(err)
	}
	snapshotter, err := service.NewStargzSnapshotterService(context.Background(), *root, &config)
	if err != nil {
		log.Fatal(err)
	}
	listener, err := net.Listen("unix", *address)
	if err != nil {
		log.Fatal(err)
	}
	server := grpc.NewServer()
	snapshotsapi.RegisterSnapshotsServer(server, snapshotservice.FromSnapshotter(snapshotter))
	log.Fatal(server.Serve(listener))
}
