// What the peers share: options, and the work done for a request, as loadtests/bench/peers/common.py has it.
package main

import (
	"bytes"
	"crypto/aes"
	"crypto/cipher"
	"crypto/rand"
	"crypto/tls"
	"flag"
	"fmt"
	"log"
	"net"
	"time"
)

var (
	listen      = flag.String("listen", "127.0.0.1:0", "HOST:PORT")
	size        = flag.Int("size", 1024, "bytes of the answer")
	noKeepalive = flag.Bool("no-keepalive", false, "close after each answer")
	timeout     = flag.Float64("timeout", 0, "seconds that a connection may be silent; 0: no limit")
	sleep       = flag.Float64("sleep", 0, "milliseconds before each answer")
	aes128      = flag.Bool("aes128", false, "encrypt the answer with AES-128-CBC")
	tlsCert     = flag.String("tls-cert", "", "file")
	tlsKey      = flag.String("tls-key", "", "file")
)

// start reads the options and returns the listener, after its address was said.
func start() net.Listener {
	flag.Parse()
	listener, err := net.Listen("tcp", *listen)
	if err != nil {
		log.Fatal(err)
	}
	if *tlsCert != "" {
		certificate, err := tls.LoadX509KeyPair(*tlsCert, *tlsKey)
		if err != nil {
			log.Fatal(err)
		}
		listener = tls.NewListener(listener, &tls.Config{Certificates: []tls.Certificate{certificate}})
	}
	fmt.Printf("listening on %s\n", listener.Addr())
	return listener
}

func idleTimeout() time.Duration {
	return time.Duration(*timeout * float64(time.Second))
}

// bodyMaker returns what makes the body of each answer.
func bodyMaker() func() []byte {
	plain := bytes.Repeat([]byte("a"), *size)
	pause := time.Duration(*sleep * float64(time.Millisecond))
	return func() []byte {
		if pause > 0 {
			time.Sleep(pause)
		}
		if *aes128 {
			return encrypt(plain)
		}
		return plain
	}
}

// encrypt is AES-128 in CBC mode with PKCS #7 padding (RFC 5652 section 6.3), behind the vector.
func encrypt(content []byte) []byte {
	block, err := aes.NewCipher([]byte("0123456789ABCDEF"))
	if err != nil {
		log.Fatal(err)
	}
	padding := aes.BlockSize - len(content)%aes.BlockSize
	padded := append(append([]byte{}, content...), bytes.Repeat([]byte{byte(padding)}, padding)...)
	encrypted := make([]byte, aes.BlockSize+len(padded))
	if _, err := rand.Read(encrypted[:aes.BlockSize]); err != nil {
		log.Fatal(err)
	}
	cipher.NewCBCEncrypter(block, encrypted[:aes.BlockSize]).CryptBlocks(encrypted[aes.BlockSize:], padded)
	return encrypted
}
