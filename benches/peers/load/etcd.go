package main

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync/atomic"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
	"go.uber.org/zap"
)

// etcd: no log, but what many use as one. A record is a key of its own below NAME/; a batch is one transaction of puts.
type etcdPeer struct {
	nodes  []string
	client *clientv3.Client
	writes atomic.Uint64
}

func openEtcd(nodes []string) (Peer, error) {
	p := &etcdPeer{nodes: nodes}
	client, err := p.connect(nodes)
	if err != nil {
		return nil, err
	}
	p.client = client
	return p, nil
}

func (p *etcdPeer) connect(endpoints []string) (*clientv3.Client, error) {
	return clientv3.New(clientv3.Config{
		Endpoints: endpoints, DialTimeout: 5 * time.Second, Logger: zap.NewNop(),
	})
}

func (p *etcdPeer) Create(ctx context.Context, name string) error {
	return retry(ctx, "first write to etcd", func(ctx context.Context) error {
		_, err := p.client.Put(ctx, name, "")
		return err
	})
}

func (p *etcdPeer) CreateMany(context.Context, string, int) error {
	return errors.New("etcd has one log, which all keys share: there are none to create")
}

func (p *etcdPeer) status(ctx context.Context) (states []*clientv3.StatusResponse, err error) {
	ctx, cancel := context.WithTimeout(ctx, time.Second)
	defer cancel()
	states = make([]*clientv3.StatusResponse, len(p.nodes))
	for i, node := range p.nodes {
		var one error
		if states[i], one = p.client.Status(ctx, node); one != nil {
			err, states[i] = one, nil
		}
	}
	return states, err
}

func (p *etcdPeer) Leader(ctx context.Context, _ string) (int, error) {
	states, err := p.status(ctx)
	for i, state := range states {
		if state != nil && state.Leader == state.Header.MemberId {
			return i, nil
		}
	}
	return 0, errors.Join(errors.New("no member of etcd says that it leads"), err)
}

func (p *etcdPeer) Whole(ctx context.Context, _ string) (bool, error) {
	states, err := p.status(ctx)
	if err != nil {
		return false, err
	}
	const near = 1000 // entries, under load
	most := uint64(0)
	for _, state := range states {
		most = max(most, state.RaftAppliedIndex)
	}
	for _, state := range states {
		if state.Leader == 0 || state.Leader != states[0].Leader || state.RaftAppliedIndex+near < most {
			return false, nil
		}
	}
	return true, nil
}

type etcdWriter struct {
	peer   *etcdPeer
	client *clientv3.Client
	prefix string
}

func (p *etcdPeer) Open(_ context.Context, name string, how How) (Writer, error) {
	client, err := p.connect(inOrder(p.nodes, how))
	if err != nil {
		return nil, err
	}
	return &etcdWriter{p, client, name + "/"}, nil
}

// key is a new one, in the order of the writes.
func (w *etcdWriter) key() string {
	return fmt.Sprintf("%s%016x", w.prefix, w.peer.writes.Add(1))
}

func (w *etcdWriter) Write(ctx context.Context, records [][]byte) error {
	if len(records) == 1 {
		_, err := w.client.Put(ctx, w.key(), string(records[0]))
		return err
	}
	puts := make([]clientv3.Op, 0, len(records))
	for _, record := range records {
		puts = append(puts, clientv3.OpPut(w.key(), string(record)))
	}
	answer, err := w.client.Txn(ctx).Then(puts...).Commit()
	if err == nil && !answer.Succeeded {
		err = errors.New("the transaction did not succeed")
	}
	return err
}

func (w *etcdWriter) Close() { _ = w.client.Close() }

func (p *etcdPeer) Read(ctx context.Context, name string, each func(message []byte)) error {
	prefix, page := name+"/", int64(1000)
	end := clientv3.GetPrefixRangeEnd(prefix)
	for from := prefix; ; {
		answer, err := p.client.Get(ctx, from, clientv3.WithRange(end), clientv3.WithLimit(page))
		if err != nil {
			return fmt.Errorf("reading etcd from %s: %w", strings.TrimSpace(from), err)
		}
		for _, pair := range answer.Kvs {
			each(pair.Value)
		}
		if !answer.More || len(answer.Kvs) == 0 {
			return nil
		}
		from = string(answer.Kvs[len(answer.Kvs)-1].Key) + "\x00"
	}
}

func (p *etcdPeer) ReadsOnce() bool { return false }

func (p *etcdPeer) Close() { _ = p.client.Close() }
