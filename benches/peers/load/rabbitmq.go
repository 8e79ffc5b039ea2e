package main

import (
	"context"
	"errors"
	"fmt"
	"strconv"
	"sync"
	"time"

	amqp "github.com/rabbitmq/amqp091-go"
)

// RabbitMQ: a log is a quorum queue on three nodes; reading takes messages out of it. Who leads is not told by the protocol: the
// program that started this one looks into the nodes.
type rabbitPeer struct {
	urls []string
	ask  func(string) (string, error)
	conn *amqp.Connection
}

func openRabbit(nodes []string, ask func(string) (string, error)) (Peer, error) {
	p := &rabbitPeer{ask: ask}
	for _, node := range nodes {
		p.urls = append(p.urls, "amqp://guest:guest@"+node+"/")
	}
	return p, nil
}

func (p *rabbitPeer) connect(how How) (conn *amqp.Connection, err error) {
	for _, url := range inOrder(p.urls, how) {
		config := amqp.Config{Dial: amqp.DefaultDial(5 * time.Second)}
		if conn, err = amqp.DialConfig(url, config); err == nil {
			return conn, nil
		}
	}
	return nil, fmt.Errorf("RabbitMQ: %w", err)
}

// channel is a new one on the peer's own connection, which is made again when it has broken.
func (p *rabbitPeer) channel() (channel *amqp.Channel, err error) {
	if p.conn == nil || p.conn.IsClosed() {
		if p.conn, err = p.connect(How{Roams: true}); err != nil {
			return nil, err
		}
	}
	return p.conn.Channel()
}

var quorum = amqp.Table{"x-queue-type": "quorum", "x-quorum-initial-group-size": 3}

func (p *rabbitPeer) Create(ctx context.Context, name string) error {
	return retry(ctx, "declare the queue "+name, func(context.Context) error {
		channel, err := p.channel()
		if err != nil {
			return err
		}
		defer channel.Close()
		_, err = channel.QueueDeclare(name, true, false, false, false, quorum)
		return err
	})
}

func (p *rabbitPeer) CreateMany(ctx context.Context, name string, count int) error {
	if _, err := p.channel(); err != nil { // one connection for all
		return err
	}
	return inParallel(count, func(i int) error { return p.Create(ctx, fmt.Sprintf("%s-%d", name, i)) })
}

func (p *rabbitPeer) Leader(_ context.Context, name string) (int, error) {
	answer, err := p.ask("leader " + name)
	if err != nil {
		return 0, err
	}
	leader, err := strconv.Atoi(answer)
	if err != nil || leader < 0 || leader >= len(p.urls) {
		return 0, fmt.Errorf("the queue %s is led by %q", name, answer)
	}
	return leader, nil
}

func (p *rabbitPeer) Whole(_ context.Context, name string) (bool, error) {
	answer, err := p.ask("whole " + name)
	return answer == "yes", err
}

type rabbitWriter struct {
	peer *rabbitPeer
	name string
	how  How

	mutex   sync.Mutex
	conn    *amqp.Connection
	channel *amqp.Channel
}

func (p *rabbitPeer) Open(_ context.Context, name string, how How) (Writer, error) {
	w := &rabbitWriter{peer: p, name: name, how: how}
	_, err := w.ready()
	return w, err
}

// ready is a channel with confirms, on the next node when the last one has gone.
func (w *rabbitWriter) ready() (*amqp.Channel, error) {
	w.mutex.Lock()
	defer w.mutex.Unlock()
	if w.channel != nil && !w.channel.IsClosed() {
		return w.channel, nil
	}
	if w.conn != nil {
		_ = w.conn.CloseDeadline(time.Now().Add(time.Second))
		w.how.First = (w.how.First + 1) % len(w.peer.urls)
	}
	conn, err := w.peer.connect(w.how)
	if err != nil {
		return nil, err
	}
	channel, err := conn.Channel()
	if err == nil {
		err = channel.Confirm(false)
	}
	if err != nil {
		conn.Close()
		return nil, err
	}
	w.conn, w.channel = conn, channel
	return channel, nil
}

func (w *rabbitWriter) Write(ctx context.Context, records [][]byte) error {
	channel, err := w.ready()
	if err != nil {
		return err
	}
	message := amqp.Publishing{DeliveryMode: amqp.Persistent, Body: joined(records)}
	confirmation, err := channel.PublishWithDeferredConfirm("", w.name, false, false, message)
	if err != nil {
		return err
	}
	acked, err := confirmation.WaitContext(ctx)
	if err == nil && !acked {
		err = errors.New("the message was refused, or the connection has ended")
	}
	return err
}

func (w *rabbitWriter) Close() {
	w.mutex.Lock()
	defer w.mutex.Unlock()
	if w.conn != nil {
		_ = w.conn.CloseDeadline(time.Now().Add(time.Second))
	}
}

func (p *rabbitPeer) Read(ctx context.Context, name string, each func(message []byte)) error {
	channel, err := p.channel()
	if err != nil {
		return err
	}
	defer channel.Close()
	queue, err := channel.QueueDeclarePassive(name, true, false, false, false, quorum)
	if err != nil || queue.Messages == 0 {
		return err
	}
	const ahead, together = 1000, 100
	if err := channel.Qos(ahead, 0, false); err != nil {
		return err
	}
	messages, err := channel.ConsumeWithContext(ctx, name, "", false, false, false, false, nil)
	if err != nil {
		return err
	}
	for read := 1; ; read++ {
		select {
		case message, open := <-messages:
			if !open {
				return fmt.Errorf("the consumer of %s was closed after %d of %d messages", name, read-1, queue.Messages)
			}
			each(message.Body)
			if read%together == 0 || read == queue.Messages {
				if err := message.Ack(true); err != nil {
					return err
				}
			}
			if read == queue.Messages {
				return nil
			}
		case <-ctx.Done():
			return fmt.Errorf("reading the queue %s, %d of %d messages: %w", name, read-1, queue.Messages, ctx.Err())
		}
	}
}

func (p *rabbitPeer) ReadsOnce() bool { return true }

func (p *rabbitPeer) Close() {
	if p.conn != nil {
		p.conn.Close()
	}
}
