#!/bin/sh
# Makes shard.pem and shard.key for the shards of a pod. Workers check that a shard's certificate names the address they
# have called, and a pod's address is not known before the pod is there.
#
#     POD_IP=10.0.0.7 sh certificate.sh FOLDER_OF_THE_AUTHORITY FOLDER_OF_THE_CERTIFICATE
set -eu
umask 077
openssl req -new -newkey ec -pkeyopt ec_paramgen_curve:P-256 -noenc -subj /OU=shard/CN=shard \
    -addext "subjectAltName=IP:$POD_IP" -addext extendedKeyUsage=serverAuth \
    -addext basicConstraints=critical,CA:FALSE -keyout "$2/shard.key" |
    openssl x509 -req -CA "$1/ca.pem" -CAkey "$1/ca.key" -days 30 -copy_extensions copyall -out "$2/shard.pem"
