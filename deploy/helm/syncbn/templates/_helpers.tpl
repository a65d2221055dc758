{{- define "syncbn.name" -}}
{{- $name := ternary .Release.Name (printf "%s-syncbn" .Release.Name) (contains "syncbn" .Release.Name) -}}
{{- $name | trunc 40 | trimSuffix "-" -}}
{{- end }}

{{- define "syncbn.labels" -}}
{{ include "syncbn.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ .Chart.Name }}-{{ .Chart.Version }}
{{- end }}

{{- define "syncbn.selector" -}}
app.kubernetes.io/name: syncbn
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{- define "syncbn.imageOf" -}}
{{- $image := index .Values.images .target -}}
image: {{ $image.repository }}{{ if $image.digest }}@{{ $image.digest }}{{ else }}:{{ $image.tag | default .Chart.AppVersion }}{{ end }}
imagePullPolicy: {{ .Values.images.pullPolicy }}
{{- end }}

{{- define "syncbn.serviceImage" -}}
{{- include "syncbn.imageOf" (dict "Values" .Values "Chart" .Chart "target" "service") -}}
{{- end }}

{{- define "syncbn.trainerImage" -}}
{{- include "syncbn.imageOf" (dict "Values" .Values "Chart" .Chart "target" "trainer") -}}
{{- end }}

{{- define "syncbn.pod" -}}
{{- with .Values.images.pullSecrets }}
imagePullSecrets:
  {{- range . }}
  - name: {{ . }}
  {{- end }}
{{- end }}
securityContext:
  runAsNonRoot: true
  runAsUser: {{ .Values.user.id }}
  runAsGroup: {{ .Values.user.group }}
  fsGroup: {{ .Values.user.group }}
  # Otherwise each start changes the owner of every file on the volume.
  fsGroupChangePolicy: OnRootMismatch
  seccompProfile: {type: RuntimeDefault}
{{- end }}

{{- define "syncbn.container" -}}
securityContext:
  allowPrivilegeEscalation: false
  readOnlyRootFilesystem: true
  runAsNonRoot: true
  capabilities: {drop: [ALL]}
  seccompProfile: {type: RuntimeDefault}
{{- end }}

{{- define "syncbn.placement" -}}
{{- with .nodeSelector }}
nodeSelector: {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .tolerations }}
tolerations: {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .runtimeClassName }}
runtimeClassName: {{ . }}
{{- end }}
{{- end }}

{{- define "syncbn.storageClaim" -}}
{{- .Values.storage.existingClaim | default (printf "%s-storage" (include "syncbn.name" .)) -}}
{{- end }}

{{- define "syncbn.publicUrl" -}}
{{- $scheme := ternary "https" "http" (ne .Values.ingress.tlsSecret "") -}}
{{- $ingress := ternary (printf "%s://%s" $scheme .Values.ingress.host) "http://localhost:8000" .Values.ingress.enabled -}}
{{- .Values.api.publicUrl | default $ingress -}}
{{- end }}

{{- define "syncbn.rayAuth" -}}
- name: RAY_AUTH_MODE
  value: token
- name: RAY_AUTH_TOKEN
  valueFrom:
    secretKeyRef: {name: {{ .Values.auth.existingSecret }}, key: ray-token}
{{- end }}

{{- define "syncbn.jobSecretsVolume" -}}
{{- with .Values.jobSecrets }}
{{- if .existingSecret }}
- name: job-secrets
  secret:
    secretName: {{ .existingSecret }}
    defaultMode: 0440
    {{- with .items }}
    items: {{- toYaml . | nindent 6 }}
    {{- end }}
{{- end }}
{{- end }}
{{- end }}

{{- define "syncbn.rayEnvironment" -}}
{{ include "syncbn.rayAuth" . }}
- name: RAY_USAGE_STATS_ENABLED
  value: "0"
- name: RAY_health_check_failure_threshold
  value: "10"
- name: RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S
  value: {{ .Values.ray.workerStartTimeoutSeconds | quote }}
- name: HOME
  value: /tmp
{{- end }}

{{- define "syncbn.rayVolumes" -}}
- name: storage
  persistentVolumeClaim: {claimName: {{ include "syncbn.storageClaim" . }}}
- name: tmp
  emptyDir: {sizeLimit: {{ .Values.ray.temporarySize }}}
{{- include "syncbn.jobSecretsVolume" . }}
{{- end }}

{{- define "syncbn.rayMounts" -}}
- {name: storage, mountPath: /storage}
- {name: tmp, mountPath: /tmp}
{{- end }}

{{- define "syncbn.rayletProbes" -}}
startupProbe:
  httpGet: {path: /api/local_raylet_healthz, port: agent}
  periodSeconds: 5
  timeoutSeconds: 5
  failureThreshold: 60
livenessProbe:
  httpGet: {path: /api/local_raylet_healthz, port: agent}
  periodSeconds: 15
  timeoutSeconds: 10
  failureThreshold: 8
{{- end }}
