// Load generator for the peers of Logboom: one workload against one cluster that is up, and one JSON object on the last line of standard
// output. What it asks of the program that started it is a line `{"ask":"…"}` before that, answered by one line on standard input;
// what it asks is in the comments of ask. The workloads are those of `logboom bench`, and so are the names of the figures.
package main

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"os"
	"strconv"
	"strings"
	"sync"
	"time"
)

type options struct {
	peer, workload       string
	nodes                []string
	pids                 []int
	warmup, duration     time.Duration
	clients, recordBytes int
	batchBytes, inFlight int
	kills, logs          int
	killPause, attempt   time.Duration
	patience             time.Duration
}

// Result is what is printed.
type Result struct {
	Peer     string            `json:"peer"`
	Workload string            `json:"workload"`
	Settings map[string]any    `json:"settings"`
	Figures  figures           `json:"figures"`
	Verdict  *Verdict          `json:"verdict,omitempty"`
	Errors   map[string]uint64 `json:"errors,omitempty"`
}

var workloads = []string{"W1", "W1-single", "W2", "W3", "W4", "W5", "W6"}

func parse(args []string) (*options, error) {
	o := &options{}
	set := flag.NewFlagSet("load", flag.ContinueOnError)
	set.StringVar(&o.peer, "peer", "", "nats, etcd, rabbitmq or kafka")
	set.StringVar(&o.workload, "workload", "", strings.Join(workloads, ", "))
	nodes := set.String("nodes", "", "HOST:PORT of the three nodes, with commas between")
	pids := set.String("pids", "", "process numbers of the three nodes, in the same order")
	set.DurationVar(&o.warmup, "warmup", 3*time.Second, "load that is not measured")
	set.DurationVar(&o.duration, "duration", 15*time.Second, "load, or rest, that is measured")
	set.IntVar(&o.clients, "clients", 0, "clients, instead of the workload's own number")
	set.IntVar(&o.recordBytes, "record-bytes", 0, "size of a record, instead of the workload's own")
	set.IntVar(&o.batchBytes, "batch-bytes", 64<<10, "size of a batch")
	set.IntVar(&o.inFlight, "in-flight", 32, "batches without an answer; single records as many as such batches hold")
	set.IntVar(&o.kills, "kills", 20, "kills of the leader's node in W4")
	set.DurationVar(&o.killPause, "kill-pause", time.Second, "load between two kills, with all nodes up")
	set.DurationVar(&o.attempt, "attempt", 250*time.Millisecond, "in W4, what a client waits for an answer before it goes on with the next record")
	set.IntVar(&o.logs, "logs", 100, "logs, or partitions, in W5")
	set.DurationVar(&o.patience, "patience", 2*time.Minute, "longest wait for what the cluster does by itself")
	if err := set.Parse(args); err != nil {
		return nil, err
	}
	o.nodes = strings.Split(*nodes, ",")
	for _, text := range strings.Split(*pids, ",") {
		pid, err := strconv.Atoi(text)
		if err != nil || pid <= 1 {
			return nil, fmt.Errorf("-pids: %q is not the number of a process", text)
		}
		o.pids = append(o.pids, pid)
	}
	known := false
	for _, name := range workloads {
		known = known || name == o.workload
	}
	record, clients := 100, 1
	switch o.workload {
	case "W1", "W1-single", "W6":
		record = 1024
	case "W2":
		clients = 64
	case "W4":
		clients = 8
	}
	if o.recordBytes == 0 {
		o.recordBytes = record
	}
	if o.clients == 0 {
		o.clients = clients
	}
	switch {
	case set.NArg() > 0:
		return nil, fmt.Errorf("%q is not understood: every argument is a flag", set.Arg(0))
	case !known:
		return nil, fmt.Errorf("-workload %q: use one of %s", o.workload, strings.Join(workloads, ", "))
	case len(o.nodes) != 3 || len(o.pids) != 3:
		return nil, errors.New("-nodes and -pids: name three nodes and their three processes")
	case o.recordBytes < stampBytes || o.recordBytes > o.batchBytes || o.batchBytes > 512<<10:
		return nil, fmt.Errorf("-record-bytes: use %d, which say what the record is, to the bytes of a batch; -batch-bytes: at most %d", stampBytes, 512<<10)
	case o.clients < 1 || o.clients > 1000 || o.inFlight < 1 || o.inFlight > 1000:
		return nil, errors.New("-clients and -in-flight: use 1 to 1000")
	case o.kills < 1 || o.logs < 1:
		return nil, errors.New("-kills and -logs: use 1 or more")
	case o.duration < time.Second || o.warmup < 0 || o.patience < time.Second || o.attempt < time.Millisecond || o.killPause < 0:
		return nil, errors.New("-duration and -patience: use 1s or more; -attempt: 1ms or more; no time is negative")
	}
	return o, nil
}

func main() {
	o, err := parse(os.Args[1:])
	if err != nil {
		if !errors.Is(err, flag.ErrHelp) {
			fmt.Fprintln(os.Stderr, "load:", err)
		}
		os.Exit(2)
	}
	result, err := o.run()
	if err != nil {
		fmt.Fprintf(os.Stderr, "load: %s, %s: %v\n", o.peer, o.workload, err)
		os.Exit(1)
	}
	text, err := json.Marshal(result)
	if err != nil {
		fmt.Fprintln(os.Stderr, "load:", err)
		os.Exit(1)
	}
	fmt.Println(string(text))
}

// asker puts questions to the program that started this one:
//
//	restart N     starts node N again, after it was killed; answered by the number of its new process
//	leader NAME   which node leads the log
//	whole NAME    yes, when all three replicas of the log are up and in step
func asker() func(string) (string, error) {
	answers := bufio.NewReader(os.Stdin)
	var mutex sync.Mutex
	return func(question string) (string, error) {
		mutex.Lock()
		defer mutex.Unlock()
		text, _ := json.Marshal(map[string]string{"ask": question})
		fmt.Println(string(text))
		answer, err := answers.ReadString('\n')
		if err != nil {
			return "", fmt.Errorf("no answer to %q: %w", question, err)
		}
		answer = strings.TrimSpace(answer)
		if problem, found := strings.CutPrefix(answer, "error "); found {
			return "", errors.New(problem)
		}
		return answer, nil
	}
}

// limit is the longest that a run may take in all.
func (o *options) limit() time.Duration {
	limit := o.warmup + o.duration + 4*o.patience
	switch o.workload {
	case "W4":
		limit += time.Duration(o.kills) * (o.killPause + 2*o.patience)
	case "W5":
		limit += o.warmup + o.duration + time.Duration(o.logs)*time.Second
	}
	return limit
}

func (o *options) run() (*Result, error) {
	ctx, cancel := context.WithTimeout(context.Background(), o.limit())
	defer cancel()
	ask := asker()
	peer, err := open(ctx, o, ask)
	if err != nil {
		return nil, err
	}
	defer peer.Close()
	b := &bench{options: o, peer: peer, ask: ask}
	b.result = Result{Peer: o.peer, Workload: o.workload, Settings: o.settings(), Figures: figures{}}
	if o.workload == "W5" {
		err = b.idle(ctx)
	} else {
		err = b.load(ctx)
	}
	b.result.Figures.rounded()
	return &b.result, err
}

func (o *options) settings() map[string]any {
	s := map[string]any{
		"warmup_seconds":   o.warmup.Seconds(),
		"duration_seconds": o.duration.Seconds(),
	}
	if o.workload == "W5" {
		s["logs"] = o.logs
		return s
	}
	s["clients"], s["record_bytes"] = o.clients, o.recordBytes
	switch o.workload {
	case "W1", "W6":
		s["batch_bytes"], s["in_flight"] = o.batchBytes, o.inFlight
	case "W1-single":
		s["records_in_flight"] = o.inFlight * (o.batchBytes / o.recordBytes)
	case "W4":
		s["kills"], s["attempt_seconds"] = o.kills, o.attempt.Seconds()
	}
	return s
}
