package main

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/twmb/franz-go/pkg/kadm"
	"github.com/twmb/franz-go/pkg/kgo"
)

// Apache Kafka, or whoever speaks its protocol: a log is the one partition of a topic with three replicas. Brokers are called 1, 2, 3.
type kafkaPeer struct {
	nodes  []string
	client *kgo.Client
	admin  *kadm.Client
}

func openKafka(nodes []string) (Peer, error) {
	client, err := kgo.NewClient(kafkaOptions(nodes)...)
	if err != nil {
		return nil, err
	}
	return &kafkaPeer{nodes, client, kadm.NewClient(client)}, nil
}

func kafkaOptions(nodes []string, more ...kgo.Opt) []kgo.Opt {
	return append([]kgo.Opt{
		kgo.SeedBrokers(nodes...),
		kgo.RequiredAcks(kgo.AllISRAcks()),
		kgo.ProducerBatchCompression(kgo.NoCompression()),
		kgo.DisableClientMetrics(),
		// As the Java client does, which waits retry.backoff.ms: the default of several seconds would be most of a failover.
		kgo.MetadataMinAge(100 * time.Millisecond),
	}, more...)
}

func (p *kafkaPeer) create(ctx context.Context, name string, partitions int) error {
	minimum := "2"
	configs := map[string]*string{"min.insync.replicas": &minimum}
	return retry(ctx, "create the topic "+name, func(ctx context.Context) error {
		made, err := p.admin.CreateTopic(ctx, int32(partitions), 3, configs, name)
		if err == nil {
			err = made.Err
		}
		// An earlier attempt may have been answered too late.
		if err != nil && made.ErrMessage != "" {
			err = fmt.Errorf("%w: %s", err, made.ErrMessage)
		}
		whole, look := p.Whole(ctx, name)
		if whole {
			return nil
		}
		return errors.Join(err, look, errors.New("its replicas are not in sync"))
	})
}

func (p *kafkaPeer) Create(ctx context.Context, name string) error { return p.create(ctx, name, 1) }

func (p *kafkaPeer) CreateMany(ctx context.Context, name string, count int) error {
	return p.create(ctx, name, count)
}

func (p *kafkaPeer) look(ctx context.Context, name string) (kadm.PartitionDetails, error) {
	topics, err := p.admin.ListTopics(ctx, name)
	if err != nil {
		return nil, err
	}
	topic := topics[name]
	return topic.Partitions, topic.Err
}

func (p *kafkaPeer) Leader(ctx context.Context, name string) (int, error) {
	partitions, err := p.look(ctx, name)
	if err != nil {
		return 0, err
	}
	leader := int(partitions[0].Leader) - 1
	if leader < 0 || leader >= len(p.nodes) {
		return 0, fmt.Errorf("the topic %s has no leader", name)
	}
	return leader, nil
}

func (p *kafkaPeer) Whole(ctx context.Context, name string) (bool, error) {
	partitions, err := p.look(ctx, name)
	for _, partition := range partitions {
		if partition.Err != nil || partition.Leader < 1 || len(partition.ISR) != 3 {
			return false, partition.Err
		}
	}
	return err == nil && len(partitions) > 0, err
}

type kafkaWriter struct{ client *kgo.Client }

func (p *kafkaPeer) Open(_ context.Context, name string, how How) (Writer, error) {
	more := []kgo.Opt{kgo.DefaultProduceTopic(name), kgo.ProducerLinger(0)}
	if how.Pipelined {
		const around = 32 // bytes that a record has beside its value, at most
		batch := how.BatchBytes + how.BatchBytes/how.RecordBytes*around + 512
		more = append(more, kgo.ProducerLinger(5*time.Millisecond), kgo.ProducerBatchMaxBytes(int32(batch)))
	}
	if how.Packed {
		// More than five unanswered requests are not to be had with idempotence.
		more = append(more, kgo.DisableIdempotentWrite(), kgo.MaxProduceRequestsInflightPerBroker(how.InFlight))
	}
	client, err := kgo.NewClient(kafkaOptions(p.nodes, more...)...)
	return &kafkaWriter{client}, err
}

func (w *kafkaWriter) Write(ctx context.Context, records [][]byte) error {
	batch := make([]*kgo.Record, 0, len(records))
	for _, record := range records {
		batch = append(batch, &kgo.Record{Value: record})
	}
	return w.client.ProduceSync(ctx, batch...).FirstErr()
}

func (w *kafkaWriter) Close() { w.client.Close() }

func (p *kafkaPeer) Read(ctx context.Context, name string, each func(message []byte)) error {
	ends, err := p.admin.ListEndOffsets(ctx, name)
	if err == nil {
		err = ends.Error()
	}
	if err != nil {
		return err
	}
	end, _ := ends.Lookup(name, 0)
	start := map[string]map[int32]kgo.Offset{name: {0: kgo.NewOffset().AtStart()}}
	client, err := kgo.NewClient(kafkaOptions(p.nodes, kgo.ConsumePartitions(start))...)
	if err != nil {
		return err
	}
	defer client.Close()
	for next := int64(0); next < end.Offset; {
		fetches := client.PollFetches(ctx)
		if err := fetches.Err0(); err != nil {
			return fmt.Errorf("reading the topic %s at offset %d of %d: %w", name, next, end.Offset, err)
		}
		if err := errors.Join(fetchErrors(fetches)...); err != nil {
			return err
		}
		fetches.EachRecord(func(record *kgo.Record) {
			each(record.Value)
			next = record.Offset + 1
		})
	}
	return nil
}

func fetchErrors(fetches kgo.Fetches) (all []error) {
	fetches.EachError(func(_ string, _ int32, err error) { all = append(all, err) })
	return all
}

func (p *kafkaPeer) ReadsOnce() bool { return false }

func (p *kafkaPeer) Close() { p.client.Close() }
