#!/usr/bin/env bash
# A run on slices of TPUs in a GKE cluster with JobSet.
#
#   tpu/gke.sh ACTION [key=value ...] [--settings FILE] [--dry-run]
#
#   build     build the image of tpu/Containerfile and push it
#   manifest  print the JobSet
#   submit    apply it
#   xpk       submit the same through xpk, in a cluster that xpk has made
#   status    the JobSet and its pods
#   logs      of all machines, followed
#   delete    take it away
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
# shellcheck source=tpu/common.sh
source "$here/common.sh"

usage() { sed -n '2,13s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; }

build() {
    need IMAGE
    do_it docker build --file "$here/Containerfile" --tag "$IMAGE" "$here/.."
    do_it docker push "$IMAGE"
}

# Every word of the command as a line of YAML; JSON strings are YAML strings.
words() {
    local word
    for word in "$CONFIG" "name=$NAME" "${OVERRIDES[@]}" "output_dir=/runs"; do
        word="${word//\\/\\\\}"
        printf '                    - "%s"\n' "${word//\"/\\\"}"
    done
}

manifest() {
    need NAME CONFIG IMAGE BUCKET TPU_TYPE TPU_TOPOLOGY HOSTS CHIPS
    cat <<EOF
apiVersion: jobset.x-k8s.io/v1alpha2
kind: JobSet
metadata:
  name: $NAME
  annotations:
    # One slice for each job, whole.
    alpha.jobset.sigs.k8s.io/exclusive-topology: cloud.google.com/gke-nodepool
spec:
  # All machines start again when one is lost: entry.sh ends with 143 after a notice. They do not after
  # a mistake (2), which fails the job by its podFailurePolicy below.
  failurePolicy:
    maxRestarts: ${RESTARTS:-20}
    rules:
      - name: mistake
        action: FailJobSet
        onJobFailureReasons: ["PodFailurePolicy"]
  replicatedJobs:
    - name: slice
      replicas: ${SLICES:-1}
      template:
        spec:
          parallelism: $HOSTS
          completions: $HOSTS
          backoffLimit: 0
          podFailurePolicy:
            rules:
              - action: FailJob
                onExitCodes:
                  containerName: run
                  operator: In
                  values: [2]
          template:
            metadata:
              annotations:
                gke-gcsfuse/volumes: "true"
            spec:
              restartPolicy: Never
              # What a run has to save its step after a notice.
              terminationGracePeriodSeconds: 120
              nodeSelector:
                cloud.google.com/gke-tpu-accelerator: $TPU_TYPE
                cloud.google.com/gke-tpu-topology: $TPU_TOPOLOGY
              containers:
                - name: run
                  image: $IMAGE
                  command: ["/app/tpu/entry.sh"]
                  args:
$(words)
                  resources:
                    requests:
                      google.com/tpu: $CHIPS
                    limits:
                      google.com/tpu: $CHIPS
                  volumeMounts:
                    - name: runs
                      mountPath: /runs
              volumes:
                - name: runs
                  csi:
                    driver: gcsfuse.csi.storage.gke.io
                    volumeAttributes:
                      bucketName: $BUCKET
                      mountOptions: "implicit-dirs"
EOF
}

submit() {
    need NAME CONFIG IMAGE BUCKET TPU_TYPE TPU_TOPOLOGY HOSTS CHIPS
    if [ "$DRY_RUN" = 1 ]; then
        printf "kubectl apply -f - <<'EOF'\n%s\nEOF\n" "$(manifest)"
    else
        manifest | kubectl apply -f -
    fi
}

with_xpk() {
    need NAME CONFIG IMAGE CLUSTER PROJECT ZONE ACCELERATOR BUCKET
    # Of itself xpk starts nothing again that ends with less than 42, and 1 is a step that hung. What it
    # mounts at /runs is attached to the cluster once, see tpu/README.md.
    do_it xpk workload create --cluster "$CLUSTER" --project "$PROJECT" --zone "$ZONE" \
        --workload "$NAME" --tpu-type "$ACCELERATOR" --num-slices "${SLICES:-1}" \
        --max-restarts "${RESTARTS:-20}" --restart-on-exit-codes 1 \
        --termination-grace-period-seconds 120 --storage "$BUCKET" --docker-image "$IMAGE" \
        --command "/app/tpu/entry.sh $(quoted "$CONFIG" "name=$NAME" "${OVERRIDES[@]}" output_dir=/runs)"
}

status() {
    need NAME
    do_it kubectl get jobset "$NAME"
    do_it kubectl get pods --selector "jobset.sigs.k8s.io/jobset-name=$NAME" --output wide
}

logs() {
    need NAME
    do_it kubectl logs --selector "jobset.sigs.k8s.io/jobset-name=$NAME" --container run \
        --follow --prefix --max-log-requests "$((${HOSTS:-1} * ${SLICES:-1}))"
}

delete() {
    need NAME
    do_it kubectl delete jobset "$NAME"
}

read_arguments "build manifest submit xpk status logs delete" "$@"
case "$ACTION" in
    xpk) with_xpk ;;
    *) "$ACTION" ;;
esac
