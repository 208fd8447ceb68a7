// A goroutine for each connection, reading and writing as the blocking Python handlers do, without a library for HTTP:
// what the Go original is built on.
package main

import (
	"bytes"
	"fmt"
	"log"
	"net"
	"time"
)

var (
	endOfHead = []byte("\r\n\r\n")
	get       = []byte("GET /")
	toClose   = []byte("onnection: close")
	old       = []byte(" HTTP/1.0\r\n")
)

func main() {
	listener := start()
	body := bodyMaker()
	answer := func(keep bool) []byte { return response(body(), keep) }
	if !*aes128 && *sleep == 0 {
		fixed := map[bool][]byte{false: response(body(), false), true: response(body(), true)}
		answer = func(keep bool) []byte { return fixed[keep] }
	}
	for {
		conn, err := listener.Accept()
		if err != nil {
			log.Print(err)
			time.Sleep(10 * time.Millisecond)
			continue
		}
		go serve(conn, answer)
	}
}

func serve(conn net.Conn, answer func(bool) []byte) {
	defer conn.Close()
	buffer := make([]byte, 8192)
	held := 0
	for {
		end := bytes.Index(buffer[:held], endOfHead)
		if end < 0 {
			if held == len(buffer) {
				return
			}
			if *timeout > 0 {
				conn.SetReadDeadline(time.Now().Add(idleTimeout()))
			}
			n, err := conn.Read(buffer[held:])
			if err != nil {
				return
			}
			held += n
			continue
		}
		head := buffer[:end+len(endOfHead)]
		if !bytes.HasPrefix(head, get) {
			return
		}
		keep := !*noKeepalive && !bytes.Contains(head, toClose) && !bytes.Contains(head, old)
		held = copy(buffer, buffer[len(head):held])
		if _, err := conn.Write(answer(keep)); err != nil || !keep {
			return
		}
	}
}

func response(body []byte, keep bool) []byte {
	connection := "close"
	if keep {
		connection = "keep-alive"
	}
	head := fmt.Sprintf("HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\nConnection: %s\r\nContent-Length: %d\r\n\r\n",
		connection, len(body))
	return append([]byte(head), body...)
}
