// containerd's own client of a proxy snapshotter, calling without pause while somebody else replaces the snapshotter under it.
//
// Usage: snapshots-load -address SOCKET -gap DURATION. Says "ready", then takes lines on standard input:
//
//	long KEY JSON     Prepare KEY with these labels, which is expected to end with "already exists" (a remote snapshot)
//	long              answers "long N": how many such calls are under way
//	report            prints the report on the calls since the last one, as one line of JSON, and begins a new one
//	end               (or its end) waits for all calls and prints the last report
package main

import (
	"bufio"
	"context"
	"encoding/json"
	"flag"
	"fmt"
	"log"
	"os"
	"sort"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	snapshotsapi "github.com/containerd/containerd/api/services/snapshots/v1"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/core/snapshots/proxy"
	"github.com/containerd/containerd/v2/pkg/dialer"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/errdefs"

	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/credentials/insecure"
)

type report struct {
	Calls     map[string]int     `json:"calls"`
	MaxMillis map[string]float64 `json:"max_ms"`
	P99Millis map[string]float64 `json:"p99_ms"`
	Failed    int                `json:"failed"`
	Errors    []string           `json:"errors"`
	Slow      []slowCall         `json:"slow"`
}

// Of 10 ms and more.
type slowCall struct {
	Name   string  `json:"name"`
	Begin  int64   `json:"begin"` // Unix ns
	Millis float64 `json:"ms"`
}

type notes struct {
	mutex  sync.Mutex
	times  map[string][]time.Duration
	failed int
	errors []string
	slow   []slowCall
}

func (n *notes) call(name string, function func() error) {
	begin := time.Now()
	err := function()
	took := time.Since(begin)
	n.mutex.Lock()
	defer n.mutex.Unlock()
	n.times[name] = append(n.times[name], took)
	if took >= 10*time.Millisecond {
		n.slow = append(n.slow, slowCall{name, begin.UnixNano(), float64(took.Microseconds()) / 1000})
	}
	if err != nil {
		n.failed++
		if len(n.errors) < 20 {
			n.errors = append(n.errors, fmt.Sprintf("%s after %v: %v", name, took, err))
		}
	}
}

func (n *notes) report() report {
	n.mutex.Lock()
	defer n.mutex.Unlock()
	out := report{map[string]int{}, map[string]float64{}, map[string]float64{}, n.failed, n.errors, n.slow}
	for name, times := range n.times {
		sort.Slice(times, func(a, b int) bool { return times[a] < times[b] })
		millis := func(i int) float64 { return float64(times[i].Microseconds()) / 1000 }
		out.Calls[name] = len(times)
		out.MaxMillis[name] = millis(len(times) - 1)
		out.P99Millis[name] = millis(len(times) * 99 / 100)
	}
	n.times, n.failed, n.errors, n.slow = map[string][]time.Duration{}, 0, nil, nil
	return out
}

func (n *notes) print() {
	if err := json.NewEncoder(os.Stdout).Encode(n.report()); err != nil {
		log.Fatal(err)
	}
}

// As containerd connects to a proxy plugin.
func connect(address string) (snapshots.Snapshotter, error) {
	config := backoff.DefaultConfig
	config.MaxDelay = 3 * time.Second
	connection, err := grpc.NewClient(dialer.DialAddress(address),
		grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithConnectParams(grpc.ConnectParams{Backoff: config}),
		grpc.WithContextDialer(dialer.ContextDialer))
	if err != nil {
		return nil, err
	}
	return proxy.NewSnapshotter(snapshotsapi.NewSnapshotsClient(connection), "holdfast"), nil
}

// What containerd does for a container, from its snapshot to the snapshot's removal, again and again.
func cycle(ctx context.Context, client snapshots.Snapshotter, n *notes, who int, gap time.Duration, end *atomic.Bool) {
	pause := func() { time.Sleep(gap) }
	for round := 0; !end.Load(); round++ {
		key := fmt.Sprintf("load-%d-%d", who, round)
		n.call("prepare", func() error { _, err := client.Prepare(ctx, key, ""); return err })
		pause()
		n.call("mounts", func() error { _, err := client.Mounts(ctx, key); return err })
		pause()
		n.call("stat", func() error { _, err := client.Stat(ctx, key); return err })
		pause()
		n.call("commit", func() error { return client.Commit(ctx, key+"-done", key) })
		pause()
		n.call("update", func() error {
			info := snapshots.Info{Name: key + "-done", Labels: map[string]string{"round": fmt.Sprint(round)}}
			_, err := client.Update(ctx, info, "labels.round")
			return err
		})
		pause()
		n.call("walk", func() error {
			return client.Walk(ctx, func(context.Context, snapshots.Info) error { return nil }, "name=="+key+"-done")
		})
		pause()
		n.call("remove", func() error { return client.Remove(ctx, key+"-done") })
		pause()
	}
}

func main() {
	address := flag.String("address", "", "unix socket of the snapshotter")
	gap := flag.Duration("gap", 2*time.Millisecond, "between a caller's calls")
	callers := flag.Int("callers", 2, "who call at once")
	flag.Parse()
	client, err := connect(*address)
	if err != nil {
		log.Fatal(err)
	}
	ctx := namespaces.WithNamespace(context.Background(), "load")
	if _, err := client.Stat(ctx, "no-such-snapshot"); !errdefs.IsNotFound(err) {
		log.Fatalf("the snapshotter does not answer: %v", err)
	}
	n := &notes{times: map[string][]time.Duration{}}
	var end atomic.Bool
	var long atomic.Int64
	var all sync.WaitGroup
	for who := 0; who < *callers; who++ {
		all.Add(1)
		go func() { defer all.Done(); cycle(ctx, client, n, who, *gap, &end) }()
	}
	fmt.Println("ready")
	lines := bufio.NewScanner(os.Stdin)
	lines.Buffer(nil, 1<<20)
	for lines.Scan() {
		words := strings.SplitN(lines.Text(), " ", 3)
		if words[0] == "end" {
			break
		}
		if words[0] == "report" {
			n.print()
			continue
		}
		if words[0] != "long" {
			log.Fatalf("what? %q", lines.Text())
		}
		if len(words) == 3 {
			labels := map[string]string{}
			if err := json.Unmarshal([]byte(words[2]), &labels); err != nil {
				log.Fatal(err)
			}
			long.Add(1)
			all.Add(1)
			go func() {
				defer all.Done()
				defer long.Add(-1)
				n.call("long prepare", func() error {
					_, err := client.Prepare(ctx, words[1], "", snapshots.WithLabels(labels))
					if errdefs.IsAlreadyExists(err) {
						return nil
					}
					return fmt.Errorf("wanted a remote snapshot, got: %v", err)
				})
			}()
		}
		fmt.Printf("long %d\n", long.Load())
	}
	end.Store(true)
	all.Wait()
	n.print()
}
