package main

import (
	"context"
	"fmt"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
)

// NATS JetStream: a log is a stream with three replicas in files, with one subject of the same name. Servers are called n0, n1, n2.
type natsPeer struct {
	urls []string
	conn *nats.Conn
	js   jetstream.JetStream
}

func openNats(nodes []string) (Peer, error) {
	p := &natsPeer{}
	for _, node := range nodes {
		p.urls = append(p.urls, "nats://"+node)
	}
	conn, js, err := p.connect(How{Roams: true})
	if err != nil {
		return nil, err
	}
	p.conn, p.js = conn, js
	return p, nil
}

func (p *natsPeer) connect(how How) (*nats.Conn, jetstream.JetStream, error) {
	options := nats.GetDefaultOptions()
	options.Servers = inOrder(p.urls, how)
	options.NoRandomize = true
	options.MaxReconnect = -1
	options.ReconnectWait = 50 * time.Millisecond
	options.IgnoreDiscoveredServers = true
	conn, err := options.Connect()
	if err != nil {
		return nil, nil, fmt.Errorf("NATS at %v: %w", options.Servers, err)
	}
	js, err := jetstream.New(conn)
	if err != nil {
		conn.Close()
		return nil, nil, err
	}
	return conn, js, nil
}

// inOrder are the addresses to try, the first one first.
func inOrder(nodes []string, how How) []string {
	if !how.Roams {
		return nodes[how.First : how.First+1]
	}
	return append(append([]string{}, nodes[how.First:]...), nodes[:how.First]...)
}

func (p *natsPeer) Create(ctx context.Context, name string) error {
	config := jetstream.StreamConfig{
		Name: name, Subjects: []string{name}, Storage: jetstream.FileStorage, Replicas: 3,
	}
	return retry(ctx, "create the stream "+name, func(ctx context.Context) error {
		_, err := p.js.CreateStream(ctx, config)
		return err
	})
}

func (p *natsPeer) CreateMany(ctx context.Context, name string, count int) error {
	return inParallel(count, func(i int) error { return p.Create(ctx, fmt.Sprintf("%s-%d", name, i)) })
}

func (p *natsPeer) info(ctx context.Context, name string) (*jetstream.StreamInfo, error) {
	stream, err := p.js.Stream(ctx, name)
	if err != nil {
		return nil, err
	}
	info := stream.CachedInfo()
	if info.Cluster == nil {
		return nil, fmt.Errorf("the stream %s says nothing of its replicas", name)
	}
	return info, nil
}

func (p *natsPeer) Leader(ctx context.Context, name string) (int, error) {
	info, err := p.info(ctx, name)
	if err != nil {
		return 0, err
	}
	leader := 0
	if _, err := fmt.Sscanf(info.Cluster.Leader, "n%d", &leader); err != nil || leader >= len(p.urls) {
		return 0, fmt.Errorf("the stream %s is led by %q", name, info.Cluster.Leader)
	}
	return leader, nil
}

func (p *natsPeer) Whole(ctx context.Context, name string) (bool, error) {
	info, err := p.info(ctx, name)
	if err != nil {
		return false, err
	}
	current := 0
	for _, replica := range info.Cluster.Replicas {
		if replica.Current && !replica.Offline {
			current++
		}
	}
	return info.Cluster.Leader != "" && current == 2, nil
}

type natsWriter struct {
	conn *nats.Conn
	js   jetstream.JetStream
	name string
}

func (p *natsPeer) Open(_ context.Context, name string, how How) (Writer, error) {
	conn, js, err := p.connect(how)
	if err != nil {
		return nil, err
	}
	return &natsWriter{conn, js, name}, nil
}

func (w *natsWriter) Write(ctx context.Context, records [][]byte) error {
	_, err := w.js.Publish(ctx, w.name, joined(records))
	return err
}

func (w *natsWriter) Close() { w.conn.Close() }

func (p *natsPeer) Read(ctx context.Context, name string, each func(message []byte)) error {
	info, err := p.info(ctx, name)
	if err != nil {
		return err
	}
	last := info.State.LastSeq
	if info.State.Msgs == 0 {
		return nil
	}
	consumer, err := p.js.OrderedConsumer(ctx, name, jetstream.OrderedConsumerConfig{})
	if err != nil {
		return err
	}
	done, failed := make(chan error, 1), false
	running, err := consumer.Consume(func(message jetstream.Msg) {
		if failed {
			return
		}
		meta, err := message.Metadata()
		if err == nil {
			each(message.Data())
		}
		if err != nil || meta.Sequence.Stream >= last {
			failed = true
			done <- err
		}
	})
	if err != nil {
		return err
	}
	defer running.Stop()
	select {
	case err = <-done:
		return err
	case <-ctx.Done():
		return fmt.Errorf("reading the stream %s: %w", name, ctx.Err())
	}
}

func (p *natsPeer) ReadsOnce() bool { return false }

func (p *natsPeer) Close() { p.conn.Close() }
