// The standard library's net/http.
package main

import (
	"log"
	"net/http"
	"strconv"
)

func main() {
	listener := start()
	body := bodyMaker()
	server := &http.Server{IdleTimeout: idleTimeout(), ReadTimeout: idleTimeout()}
	server.SetKeepAlivesEnabled(!*noKeepalive)
	server.Handler = http.HandlerFunc(func(w http.ResponseWriter, request *http.Request) {
		content := body()
		header := w.Header()
		header["Date"] = nil // no other peer sends it
		header.Set("Content-Type", "text/plain")
		header.Set("Content-Length", strconv.Itoa(len(content)))
		if !*noKeepalive && !request.Close {
			header.Set("Connection", "keep-alive")
		}
		w.Write(content)
	})
	log.Fatal(server.Serve(listener))
}
