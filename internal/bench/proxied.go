// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"syscall"
	"time"

	"github.com/fintrace/fintrace/internal/selfsigned"
)

// A proxied load is requests to a real HAProxy that ends TLS, as many at once as
// there are clients. Each has two connections of its own, to HAProxy and from it
// to the server, and a whole handshake. Clients and server are in this process.
const (
	clientsPerCPU = 4
	proxyAddr     = "127.0.0.1:443"
	serverAddr    = "127.0.0.1:8080"
)

const (
	proxyRequest  = "GET / HTTP/1.1\r\nHost: bench\r\nConnection: close\r\n\r\n"
	proxyResponse = "HTTP/1.1 200 OK\r\nContent-Length: 3\r\nConnection: close\r\n\r\nok\n"
)

func (l load) beginProxied() (_ *running, err error) {
	dir, err := os.MkdirTemp("", "bench")
	if err != nil {
		return nil, err
	}
	stops := []func() error{func() error { return os.RemoveAll(dir) }}
	stop := func() (err error) {
		for i := range stops {
			err = errors.Join(err, stops[len(stops)-1-i]())
		}
		return err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, stop())
		}
	}()
	server, err := net.Listen("tcp", serverAddr)
	if err != nil {
		return nil, err
	}
	stops = append(stops, server.Close)
	go serve(server)
	end, err := startHAProxy(dir)
	if err != nil {
		return nil, err
	}
	stops = append(stops, end)

	threads := clientsPerCPU * runtime.NumCPU()
	r := &running{start: time.Now(), threads: threads, done: make(chan done, threads), stop: stop}
	for n := range threads {
		c := client{load: l, start: r.start, requests: (l.Connections + n) / threads}
		go func() {
			err := c.run()
			r.done <- done{c.work, err}
		}()
	}
	return r, nil
}

// serve answers each request, until the listener is closed.
func serve(l net.Listener) {
	for {
		c, err := l.Accept()
		if err != nil {
			return
		}
		go func() {
			defer c.Close()
			if _, err := c.Read(make([]byte, 4096)); err == nil {
				_, _ = io.WriteString(c, proxyResponse) // Whether it comes is seen by the client.
			}
		}()
	}
}

type client struct {
	load     load
	start    time.Time
	requests int
	work
}

func (c *client) run() error {
	for c.made < c.requests && time.Since(c.start) < c.load.Duration {
		began := time.Now()
		if err := request(); err != nil {
			return err
		}
		c.made++
		if c.load.Latency {
			c.lives = append(c.lives, lifeOf(c.start, began))
		}
	}
	return nil
}

var clientTLS = &tls.Config{
	InsecureSkipVerify: true, // The certificate is ours.
	// No key of a kind that most HAProxies do not know is made in vain.
	CurvePreferences: []tls.CurveID{tls.X25519},
}

func request() error {
	conn, err := net.Dial("tcp", proxyAddr)
	if err != nil {
		return err
	}
	defer conn.Close() // Without an alert before it: the other end has closed.
	secure := tls.Client(conn, clientTLS)
	if _, err := io.WriteString(secure, proxyRequest); err != nil {
		return fmt.Errorf("request: %w", err)
	}
	answer, err := io.ReadAll(secure)
	if err != nil || !bytes.HasSuffix(answer, []byte("ok\n")) {
		return errors.Join(fmt.Errorf("the answer is %q", answer), err)
	}
	return nil
}

const haproxyConfig = `global
    maxconn 1000
defaults
    mode http
    timeout connect 10s
    timeout client 10s
    timeout server 10s
frontend https
    bind %s ssl crt %s
    default_backend servers
backend servers
    server server %s
`

// startHAProxy returns once it accepts connections.
func startHAProxy(dir string) (end func() error, err error) {
	path, err := exec.LookPath("haproxy")
	if err != nil {
		return nil, errors.New("haproxy is not installed")
	}
	certificate, config := filepath.Join(dir, "bench.pem"), filepath.Join(dir, "haproxy.cfg")
	signed, key, err := selfsigned.PEM(x509.Certificate{DNSNames: []string{"bench"}})
	if err != nil {
		return nil, err
	}
	if err := errors.Join(
		os.WriteFile(certificate, append(signed, key...), 0o600),
		os.WriteFile(config, fmt.Appendf(nil, haproxyConfig, proxyAddr, certificate, serverAddr), 0o600),
	); err != nil {
		return nil, err
	}
	var said bytes.Buffer
	cmd := exec.Command(path, "-db", "-f", config)
	cmd.Stderr = &said
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := cmd.Start(); err != nil {
		return nil, err
	}
	ended := make(chan error, 1)
	go func() { ended <- cmd.Wait() }()
	end = func() error {
		// How it exits on a signal is its own affair.
		_ = cmd.Process.Signal(syscall.SIGTERM)
		<-ended
		return nil
	}
	for deadline := time.Now().Add(5 * time.Second); ; time.Sleep(5 * time.Millisecond) {
		err := request()
		if err == nil {
			return end, nil
		}
		select {
		case <-ended:
			return nil, fmt.Errorf("haproxy ended at once: %s", firstLine(said.String()))
		default:
		}
		if time.Now().After(deadline) {
			return nil, errors.Join(fmt.Errorf("haproxy does not answer: %w", err), end())
		}
	}
}
